// The page: select a video, enter queries, and show their moments.

import * as api from "./api.js";
import { Picker } from "./picker.js";
import { Timeline, clock } from "./timeline.js";

const MAX_QUERIES = 8;
const $ = (id) => document.getElementById(id);
const player = $("player");

let video = null;
/** Objects `{query, number, color, moments, unknown}`; moments are null until the response arrives. */
let answers = [];
let chosen = null;
let stopAt = Infinity;
let pending = 0;

const timeline = new Timeline($("timeline"), { seek, choose: (row, rank) => play(row, rank) });
const picker = new Picker($("picker"), $("options"), {
  find: api.videos,
  choose: (found) => open(found).then(() => $("query").focus()),
  fail: show,
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
  $("picker").value = found.name;
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
    $("picker").focus();
    return;
  }
  const known = answers.find((answer) => answer.query === query);
  if (known) answers.splice(answers.indexOf(known), 1);
  if (answers.length >= MAX_QUERIES) answers.shift();
  const number = freeNumber();
  const answer = { query, number, color: `var(--c${number - 1})`, moments: null, unknown: [] };
  answers.push(answer);
  chosen = null;
  draw();
  pending += 1;
  $("go").disabled = true;
  try {
    Object.assign(answer, await api.ground(video.id, query, Number($("count").value)));
    const [best] = answer.moments;
    say(
      best
        ? `“${query}”: ${answer.moments.length} moments, the best from ${clock(best.start)} to ${clock(best.end)}.`
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

function draw() {
  timeline.draw(answers, chosen);
  $("answers").replaceChildren(...answers.map(card));
  $("clear").hidden = !answers.length;
  $("hint").hidden = !video;
}

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function card(answer, row) {
  const item = element("li");
  item.style.setProperty("--color", answer.color);
  const head = element("p", "sentence");
  const away = element("button", "", "×");
  away.type = "button";
  away.setAttribute("aria-label", `Remove “${answer.query}”`);
  away.addEventListener("click", () => remove(row));
  head.append(element("b", "", answer.number), element("span", "", answer.query), away);
  item.append(head);
  if (answer.unknown.length) {
    item.append(element("p", "left-out", `Unknown words, ignored: ${answer.unknown.join(", ")}.`));
  }
  if (!answer.moments) item.append(element("p", "waiting", video.state === "extracting" ? "Waiting for the video" : "Searching"));
  else if (!answer.moments.length) item.append(element("p", "nothing", "No moment found."));
  else {
    const list = element("ol", "moments");
    list.append(...answer.moments.map((moment, rank) => entry(answer, moment, row, rank)));
    item.append(list);
  }
  return item;
}

function entry(answer, moment, row, rank) {
  const item = element("li");
  const button = element("button", rank ? "moment" : "moment best");
  button.type = "button";
  button.id = `moment-${row}-${rank}`;
  const here = chosen ? chosen[0] === row && chosen[1] === rank : false;
  button.setAttribute("aria-current", String(here));
  // Tab reaches one moment, and arrow keys the others.
  button.tabIndex = here || (!chosen && row === 0 && rank === 0) ? 0 : -1;
  const from = `${clock(moment.start)} – ${clock(moment.end)}`;
  button.setAttribute("aria-label", `${rank + 1}: from ${clock(moment.start)} to ${clock(moment.end)}, score ${moment.score.toFixed(2)}`);
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
$("local").addEventListener("click", () => {
  const file = element("input");
  file.type = "file";
  file.accept = "video/*";
  file.addEventListener("change", () => file.files.length && showMedia(URL.createObjectURL(file.files[0])));
  file.click();
});

// Uploads.

let sending = new AbortController();
const isVideo = (file) => file.type.startsWith("video/") || /\.(mp4|m4v|mov|webm|mkv|avi)$/i.test(file.name);

function chooseFile() {
  const file = $("file").files[0];
  $("clock").hidden = !file || isVideo(file);
  $("damaged").hidden = !file || !isVideo(file);
  $("partial").checked = false;
  $("sending-problem").hidden = true;
}

function openSending() {
  $("progress").hidden = true;
  $("upload").disabled = false;
  chooseFile();
  $("sending").showModal();
}

$("send").addEventListener("click", openSending);
$("file").addEventListener("change", chooseFile);
$("cancel").addEventListener("click", () => $("sending").close());
$("sending").addEventListener("close", () => sending.abort());
$("sending").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const file = $("file").files[0];
  if (!file) {
    $("file").focus();
    return;
  }
  const fields = isVideo(file) ? { video: file } : { duration: $("duration").value, features: file };
  if (!isVideo(file) && !$("duration").value) {
    $("duration").focus();
    return;
  }
  if (!isVideo(file) && $("frames").value) fields.num_frames = $("frames").value;
  if (isVideo(file) && $("partial").checked) fields.partial = true;
  sending = new AbortController();
  $("upload").disabled = true;
  $("sending-problem").hidden = true;
  $("progress").hidden = false;
  try {
    const sent = await api.send(fields, (share) => ($("progress").value = share), sending.signal);
    $("sending").close();
    await open(sent);
    $("query").focus();
    if (sent.state === "extracting") await extracted(sent.id);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("sending-problem").textContent = error.message;
    $("sending-problem").hidden = false;
    $("upload").disabled = false;
    $("progress").hidden = true;
  }
});

/** Wait until the features of an upload are extracted. */
async function extracted(id) {
  say("The features of the video are being extracted.");
  $("problem").hidden = true;
  while (video?.id === id) {
    const now = await api.video(id);
    if (video?.id !== id) return;
    if (now.state === "extracting") {
      $("model").textContent = "Extracting the features of the video…";
      await new Promise((resolve) => setTimeout(resolve, 700));
      continue;
    }
    video = now;
    about();
    if (now.state === "failed") show(new Error(now.problem));
    else {
      timeline.show(now.duration);
      draw();
      say("The video is ready.");
    }
    return;
  }
  about();
}

for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", name === "dragover");
    if (name === "drop") {
      $("file").files = event.dataTransfer.files;
      openSending();
    }
  });
}

api.onKeyRequired(
  () =>
    new Promise((resolve) => {
      const dialog = $("locked");
      if (!dialog.open) dialog.showModal();
      dialog.addEventListener("cancel", (event) => event.preventDefault());
      dialog.addEventListener("close", () => resolve($("key").value), { once: true });
    }),
);

let service = "";
function about() {
  $("model").textContent = service;
}

async function begin() {
  const health = await api.health();
  service = `${health.model} · ${health.digest.slice(0, 12)}`;
  about();
  $("sending-about").textContent =
    "A video file, if the service has an extractor, or clip features (.npy, .npz).";
  const parameters = new URLSearchParams(location.hash.slice(1));
  showMedia(null);
  draw();
  if (parameters.get("video")) await open(await api.video(parameters.get("video")), parameters.getAll("q").slice(0, MAX_QUERIES));
}

const begun = begin().catch(show);
