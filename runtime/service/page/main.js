// The page: select a video, enter queries, and show their moments.

import * as api from "./api.js";
import { Combobox } from "./combobox.js";
import { element, save } from "./dom.js";
import { showExamples } from "./examples.js";
import { Timeline, clock } from "./timeline.js";
import { connectUploads } from "./uploads.js";

const MAX_QUERIES = 8;
const $ = (id) => document.getElementById(id);
const player = $("player");
// Minimum number of letters of a word that is completed.
const MIN_LETTERS = 2;

/** The description of the model, from the service. */
let model = { no_match_threshold: null };
let video = null;
/**
 * Objects `{query, number, color, moments, unknown, isBelow}`; moments are null until the response arrives, and isBelow
 * is whether all of them score below the model's no-match threshold.
 */
let answers = [];
let chosen = null;
let stopAt = Infinity;
let pending = 0;

const timeline = new Timeline($("timeline"), { seek, choose: (row, rank) => play(row, rank) });

const videoField = $("picker");
const videos = new Combobox(videoField, $("videos"), {
  text: (isTyped) => (isTyped ? videoField.value.trim() : ""),
  find: api.videos,
  render: (found) => [
    element("span", "", found.name),
    element("span", "quiet", clock(found.duration, 0) + (found.media ? " · video file" : "")),
  ],
  note(text, { total, items }) {
    if (total > items.length) return `… and ${total - items.length} more. Type a part of the name.`;
    if (items.length) return "";
    return text ? "No name of a video contains this text." : "The service has no data set. Upload a video instead.";
  },
  choose: (found) => open(found).then(() => $("query").focus()),
  fail: show,
  selectsFirst: true,
});
videoField.addEventListener("focus", () => videoField.select());
videoField.addEventListener("click", () => $("videos").hidden && videos.open(""));

/** Return the word before the cursor of the query, and its start. */
function wordAtCursor() {
  const field = $("query");
  const [word] = field.value.slice(0, field.selectionStart).match(/[^\s]*$/);
  return { word, start: field.selectionStart - word.length };
}

const words = new Combobox($("query"), $("words"), {
  text: () => (wordAtCursor().word.length >= MIN_LETTERS ? wordAtCursor().word : null),
  find: api.words,
  render: (word) => [element("span", "", word)],
  note: (text, { total, items }) =>
    total > items.length ? `… and ${total - items.length} more.` : items.length ? "" : `No known word starts with “${text}”.`,
  choose(word) {
    const { word: typed, start } = wordAtCursor();
    const end = start + typed.length;
    const space = $("query").value[end] === " " ? "" : " ";
    $("query").setRangeText(word + space, start, end, "end");
  },
  // Words are a help only.
  fail: () => {},
  selectsFirst: false,
});

function show(error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
  $("query").setAttribute("aria-invalid", String(error.code === "invalid_query"));
}

function unshow() {
  $("problem").hidden = true;
  $("query").removeAttribute("aria-invalid");
}

function say(text) {
  $("said").textContent = text;
}

/** Return the smallest number that no shown query has. */
function freeNumber() {
  const taken = new Set(answers.map((answer) => answer.number));
  return [...Array(MAX_QUERIES + 1).keys()].slice(1).find((number) => !taken.has(number));
}

async function open(found, queries = []) {
  video = found;
  answers = [];
  chosen = null;
  stopAt = Infinity;
  unshow();
  videoField.value = found.name;
  document.body.classList.add("started");
  $("examples").hidden = true;
  showMedia(found.media);
  timeline.show(found.duration);
  draw();
  say(`${found.name}, ${found.duration ? clock(found.duration) : "not yet extracted"}.`);
  for (const query of queries) await ask(query);
  remember();
}

function showMedia(source) {
  player.pause();
  if (source) player.src = source;
  else player.removeAttribute("src");
  player.load();
  player.hidden = !source;
  $("blank").hidden = Boolean(source);
  $("screen").classList.toggle("empty", !source);
  $("local").hidden = !video;
  $("blank-text").textContent = video
    ? "The service has no video file of this video. The timeline works without it."
    : "Choose a video to begin.";
}

/** Store video and queries in the address, so that it can be shared and reloaded. */
function remember() {
  const parts = new URLSearchParams();
  if (video) parts.append("video", video.id);
  for (const answer of answers) parts.append("q", answer.query);
  history.replaceState(null, "", `#${parts}`);
}

async function ask(query) {
  unshow();
  if (!video) {
    show(new Error("Choose a video first, or upload one."));
    videoField.focus();
    return;
  }
  const known = answers.find((answer) => answer.query === query);
  if (known) answers.splice(answers.indexOf(known), 1);
  if (answers.length >= MAX_QUERIES) answers.shift();
  const number = freeNumber();
  const answer = { query, number, color: `var(--c${number - 1})`, moments: null, unknown: [], isBelow: false };
  answers.push(answer);
  chosen = null;
  draw();
  pending += 1;
  $("go").disabled = true;
  try {
    Object.assign(answer, await ground(query));
    const [best] = answer.moments;
    say(
      best
        ? `“${query}”: ${answer.moments.length} moments, the best from ${clock(best.start)} to ${clock(best.end)}. ${doubts(answer).join(" ")}`
        : `“${query}”: no moment found.`,
    );
  } catch (error) {
    answers = answers.filter((other) => other !== answer);
    show(error);
  } finally {
    pending -= 1;
    $("go").disabled = pending > 0;
  }
  draw();
  remember();
}

/** Ask the service; if the best moment scores below the threshold, return the moments as doubtful ones. */
async function ground(query) {
  const count = Number($("count").value);
  const answer = await api.ground(video.id, query, count);
  if (answer.moments.length || model.no_match_threshold === null) return answer;
  const { moments } = await api.ground(video.id, query, count, true);
  // Without a likely location, the only moment is the entire video with score 1.
  const isBelow = moments.length > 0 && isDoubtful(moments[0]);
  return { ...answer, moments: isBelow ? moments : [], isBelow };
}

function isDoubtful(moment) {
  return model.no_match_threshold !== null && moment.score < model.no_match_threshold;
}

/** Return the reasons to doubt an answer, as sentences. */
function doubts(answer) {
  const reasons = [];
  if (answer.unknown.length) reasons.push(`Unknown words, ignored: ${answer.unknown.join(", ")}.`);
  if (answer.isBelow) {
    reasons.push(`All scores are below ${model.no_match_threshold.toFixed(2)}, the model's no-match threshold.`);
  }
  return reasons;
}

function draw() {
  timeline.draw(answers, chosen, isDoubtful);
  $("answers").replaceChildren(...answers.map(card));
  $("clear").hidden = !answers.length;
  $("hint").hidden = !video;
  // Files contain no answers below the threshold, as those of `infer`.
  $("downloads").hidden = !answers.some((answer) => answer.moments?.length && !answer.isBelow);
}

function card(answer, row) {
  const item = element("li");
  item.style.setProperty("--color", answer.color);
  const head = element("p", "sentence");
  const away = element("button", "", "×");
  away.type = "button";
  away.setAttribute("aria-label", `Remove “${answer.query}”`);
  away.addEventListener("click", () => remove(row));
  const reasons = doubts(answer);
  head.append(element("b", "", answer.number), element("span", "", answer.query), away);
  item.append(head);
  if (reasons.length) item.append(element("p", "reason", element("em", "doubt", "Doubtful"), reasons.join(" ")));
  if (!answer.moments) item.append(element("p", "waiting", video.state === "extracting" ? "Waiting for the video" : "Searching"));
  else if (!answer.moments.length) item.append(element("p", "nothing", "No moment found."));
  else {
    const list = element("ol", "moments");
    list.append(...answer.moments.map((moment, rank) => entry(answer, moment, row, rank)));
    item.append(list);
    if (video.media && model.writes_clips) item.append(clipButton(answer, row));
  }
  return item;
}

/** Return the button that saves the selected moment of an answer, or the best one, as a clip. */
function clipButton(answer, row) {
  const moment = answer.moments[chosen && chosen[0] === row ? chosen[1] : 0];
  const span = `${clock(moment.start)} – ${clock(moment.end)}`;
  const button = element("button", "clip", `Save clip ${span}`);
  button.type = "button";
  button.addEventListener("click", () => download(button, () => api.clip(video.id, moment), `${answer.query.slice(0, 60)}.mp4`));
  return button;
}

/** Save a file of the service; the button is disabled meanwhile. */
async function download(button, request, name) {
  unshow();
  button.disabled = true;
  about("Preparing the file…");
  try {
    save(await request(), `${video.name} ${name}`);
    say("The file is saved.");
  } catch (error) {
    show(error);
  }
  about();
  button.disabled = false;
}

function entry(answer, moment, row, rank) {
  const item = element("li");
  const button = element("button", "moment");
  button.classList.toggle("best", rank === 0);
  button.classList.toggle("doubtful", isDoubtful(moment));
  button.type = "button";
  button.id = `moment-${row}-${rank}`;
  const here = chosen ? chosen[0] === row && chosen[1] === rank : false;
  button.setAttribute("aria-current", String(here));
  // Tab reaches one moment, and arrow keys the others.
  button.tabIndex = here || (!chosen && row === 0 && rank === 0) ? 0 : -1;
  const from = `${clock(moment.start)} – ${clock(moment.end)}`;
  button.setAttribute("aria-label", `${rank + 1}: from ${clock(moment.start)} to ${clock(moment.end)}, score ${moment.score.toFixed(2)}${isDoubtful(moment) ? ", doubtful" : ""}`);
  const meter = element("span", "meter");
  const level = element("i");
  level.style.width = `${100 * moment.score}%`;
  meter.append(level);
  button.append(element("span", "rank", rank + 1), element("span", "when", from), meter, element("span", "score", moment.score.toFixed(2)));
  button.addEventListener("click", () => play(row, rank));
  item.append(button);
  return item;
}

/** Select a moment, and move the focus to it if a moment has the focus. */
function choose(row, rank) {
  const focused = document.activeElement?.classList.contains("moment");
  chosen = [row, rank];
  draw();
  const button = $(`moment-${row}-${rank}`);
  if (focused) button.focus();
  return answers[row].moments[rank];
}

function play(row, rank) {
  const again = chosen && chosen[0] === row && chosen[1] === rank && !player.paused;
  const moment = choose(row, rank);
  if (again) {
    player.pause();
    return;
  }
  seek(moment.start);
  stopAt = moment.end;
  if (!player.hidden) player.play().catch(() => {});
}

function seek(seconds) {
  stopAt = Infinity;
  timeline.at(seconds);
  if (!player.hidden) player.currentTime = seconds;
}

function remove(row) {
  answers.splice(row, 1);
  chosen = null;
  draw();
  remember();
  ($("answers").querySelector(".moment[tabindex='0']") ?? $("query")).focus();
}

function follow() {
  if (!player.hidden) timeline.at(player.currentTime);
  if (player.currentTime >= stopAt) {
    player.pause();
    stopAt = Infinity;
  }
}
player.addEventListener("timeupdate", follow);
player.addEventListener("seeking", follow);
player.addEventListener("playing", function frame() {
  follow();
  if (!player.paused) requestAnimationFrame(frame);
});
// A video file that starts before its first frame, or ends after its last, is longer than its features.
player.addEventListener("durationchange", () => {
  if (timeline.duration > 0 && Number.isFinite(player.duration) && player.duration > timeline.duration) {
    timeline.show(player.duration);
    draw();
  }
});
player.addEventListener("error", () => {
  if (player.getAttribute("src")) {
    showMedia(null);
    $("blank-text").textContent = "This browser cannot play the video file. The timeline works without it.";
  }
});

$("answers").addEventListener("keydown", (event) => {
  const at = document.activeElement?.id.match(/^moment-(\d+)-(\d+)$/);
  if (!at) return;
  let [row, rank] = [Number(at[1]), Number(at[2])];
  const ranks = (of) => answers[of]?.moments?.length ?? 0;
  const flat = answers.flatMap((_, of) => [...Array(ranks(of)).keys()].map((other) => [of, other]));
  const index = flat.findIndex(([of, other]) => of === row && other === rank);
  if (event.key === "ArrowDown" || event.key === "ArrowRight") [row, rank] = flat[Math.min(flat.length - 1, index + 1)];
  else if (event.key === "ArrowUp" || event.key === "ArrowLeft") [row, rank] = flat[Math.max(0, index - 1)];
  else if (event.key === "Home") [row, rank] = flat[0];
  else if (event.key === "End") [row, rank] = flat[flat.length - 1];
  else if (event.key === "Delete") {
    event.preventDefault();
    remove(row);
    return;
  } else return;
  event.preventDefault();
  const moment = choose(row, rank);
  seek(moment.start);
});

// Space plays and pauses, except in controls that use it.
document.addEventListener("keydown", (event) => {
  const busy = event.target.closest("input, select, textarea, button, a, video, dialog, [role=listbox]");
  if (event.key !== " " || busy || player.hidden) return;
  event.preventDefault();
  if (player.paused) player.play().catch(() => {});
  else player.pause();
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = $("query").value.trim();
  if (!query) {
    $("query").focus();
    return;
  }
  words.close();
  // A query that is entered while the video of the address loads applies to that video.
  begun.then(() => ask(query)).then(() => $("problem").hidden && $("query").select());
});
$("clear").addEventListener("click", () => {
  answers = [];
  chosen = null;
  draw();
  remember();
  $("query").focus();
});
for (const format of ["srt", "csv"]) {
  $(format).addEventListener("click", () => {
    const queries = answers.filter((answer) => answer.moments).map((answer) => answer.query);
    download($(format), () => api.answers(video.id, queries, Number($("count").value), format), `moments.${format}`);
  });
}
$("count").addEventListener("change", () => video && open(video, answers.map((answer) => answer.query)).catch(show));
$("local").addEventListener("click", () => {
  const file = element("input");
  file.type = "file";
  file.accept = "video/*";
  file.addEventListener("change", () => file.files.length && showMedia(URL.createObjectURL(file.files[0])));
  file.click();
});

api.onKeyRequired(
  (wasRejected) =>
    new Promise((resolve) => {
      const dialog = $("locked");
      $("locked-problem").hidden = !wasRejected;
      if (!dialog.open) dialog.showModal();
      dialog.addEventListener("cancel", (event) => event.preventDefault());
      dialog.addEventListener("close", () => resolve($("key").value), { once: true });
    }),
);

connectUploads({
  open: (sent) => open(sent).then(() => $("query").focus()),
  current: () => video,
  changed(sent) {
    video = sent;
    if (sent.state === "failed") show(new Error(sent.problem));
    else {
      timeline.show(sent.duration);
      draw();
      say("The video is ready.");
    }
  },
  say,
  status: about,
});

/** Show the model, or what the service does now. */
function about(text = `${model.model} · ${model.precision} · ${model.words} words`) {
  $("model").textContent = text;
}

async function begin() {
  model = await api.model();
  about();
  $("sending-about").textContent = model.accepts_videos
    ? "A video file, or clip features (.npy, .npz)."
    : "Clip features (.npy, .npz). This service has no extractor for video files.";
  const parameters = new URLSearchParams(location.hash.slice(1));
  showMedia(null);
  draw();
  if (parameters.get("video")) {
    await open(await api.video(parameters.get("video")), parameters.getAll("q").slice(0, MAX_QUERIES));
  } else {
    const examples = await api.examples();
    if (!examples.length && !video) $("blank-text").textContent = "Upload a video to begin.";
    else if (!video) showExamples($("examples"), examples, ({ video, query }) => open(video, query ? [query] : []));
  }
}

const begun = begin().catch(show);
