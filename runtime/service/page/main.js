// The page: a video, sentences, and where they happen.

import * as api from "./api.js";
import { Picker } from "./picker.js";
import { Timeline, clock } from "./timeline.js";

const MOST_SENTENCES = 8;
const $ = (id) => document.getElementById(id);
const player = $("player");

let video = null;
/** `{query, number, colour, moments, unknown}` each; moments are missing while they are asked for. */
let answers = [];
let chosen = null;
let stopAt = Infinity;
let asked = 0;

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

/** Colours and numbers that no other sentence has now. */
function freeNumber() {
  const taken = new Set(answers.map((answer) => answer.number));
  return [...Array(MOST_SENTENCES + 1).keys()].slice(1).find((number) => !taken.has(number));
}

async function open(found, queries = []) {
  video = found;
  answers = [];
  chosen = null;
  stopAt = Infinity;
  unshow();
  $("picker").value = found.name;
  film(found.media);
  timeline.show(found.duration);
  draw();
  say(`${found.name}, ${found.duration ? clock(found.duration) : "not yet extracted"}.`);
  for (const query of queries) await ask(query);
  remember();
}

function film(source) {
  player.pause();
  if (source) player.src = source;
  else player.removeAttribute("src");
  player.load();
  player.hidden = !source;
  $("blank").hidden = Boolean(source);
  $("screen").classList.toggle("empty", !source);
  $("local").hidden = !video;
  $("blank-text").textContent = video
    ? "The service has no film of this video. The time line works without it."
    : "Choose a video to begin.";
}

/** Keep what is shown in the address, so that it can be shared and comes back. */
function remember() {
  const parts = new URLSearchParams();
  if (video) parts.append("video", video.id);
  for (const answer of answers) parts.append("q", answer.query);
  history.replaceState(null, "", `#${parts}`);
}

async function ask(query) {
  unshow();
  if (!video) {
    show(new Error("Choose a video first, or send one."));
    $("picker").focus();
    return;
  }
  const known = answers.find((answer) => answer.query === query);
  if (known) answers.splice(answers.indexOf(known), 1);
  if (answers.length >= MOST_SENTENCES) answers.shift();
  const number = freeNumber();
  const answer = { query, number, colour: `var(--c${number - 1})`, moments: null, unknown: [] };
  answers.push(answer);
  chosen = null;
  draw();
  asked += 1;
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
    asked -= 1;
    $("go").disabled = asked > 0;
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
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function card(answer, row) {
  const item = element("li");
  item.style.setProperty("--colour", answer.colour);
  const head = element("p", "sentence");
  const away = element("button", "", "×");
  away.type = "button";
  away.setAttribute("aria-label", `Remove “${answer.query}”`);
  away.addEventListener("click", () => remove(row));
  head.append(element("b", "", answer.number), element("span", "", answer.query), away);
  item.append(head);
  if (answer.unknown.length) {
    item.append(element("p", "left-out", `The model does not know ${answer.unknown.join(", ")}; left out.`));
  }
  if (!answer.moments) item.append(element("p", "waiting", video.state === "extracting" ? "Waiting for the video" : "Looking"));
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
  // One of all can be reached by Tab; arrows go on from there.
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

/** Mark a moment, and move the focus to it if it was among the moments. */
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
// A film that begins before its first picture, or ends after its last, is longer than its features.
player.addEventListener("durationchange", () => {
  if (timeline.duration > 0 && Number.isFinite(player.duration) && player.duration > timeline.duration) {
    timeline.show(player.duration);
    draw();
  }
});
player.addEventListener("error", () => {
  if (player.getAttribute("src")) {
    film(null);
    $("blank-text").textContent = "This browser cannot play the film. The time line works without it.";
  }
});

$("answers").addEventListener("keydown", (event) => {
  const at = document.activeElement?.id.match(/^moment-(\d+)-(\d+)$/);
  if (!at) return;
  let [row, rank] = [Number(at[1]), Number(at[2])];
  const ranks = (of) => answers[of]?.moments?.length ?? 0;
  const flat = answers.flatMap((_, of) => [...Array(ranks(of)).keys()].map((other) => [of, other]));
  const place = flat.findIndex(([of, other]) => of === row && other === rank);
  if (event.key === "ArrowDown" || event.key === "ArrowRight") [row, rank] = flat[Math.min(flat.length - 1, place + 1)];
  else if (event.key === "ArrowUp" || event.key === "ArrowLeft") [row, rank] = flat[Math.max(0, place - 1)];
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

// Space plays and pauses, but where it means something else.
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
  // What is asked while the video of the address is still on its way is asked about that one.
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
  file.addEventListener("change", () => file.files.length && film(URL.createObjectURL(file.files[0])));
  file.click();
});

// Sending a video.

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

/** Wait until the service has the features of a video that was sent. */
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

api.onKeyWanted(
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
  const told = await api.health();
  service = `${told.model} · ${told.digest.slice(0, 12)}`;
  about();
  $("sending-about").textContent =
    "A video file, where the service was started with an extractor, or its clip features (.npy, .npz).";
  const wanted = new URLSearchParams(location.hash.slice(1));
  film(null);
  draw();
  if (wanted.get("video")) await open(await api.video(wanted.get("video")), wanted.getAll("q").slice(0, MOST_SENTENCES));
}

const begun = begin().catch(show);
