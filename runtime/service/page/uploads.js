// Upload a video file or features in a dialog, also by drag and drop.

import * as api from "./api.js";

const POLL_MS = 700;
const $ = (id) => document.getElementById(id);

let sending = new AbortController();
let page = null;
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

/**
 * Connect the dialog to the page.
 *
 * @param handlers - `open(video)` opens a new upload, `current()` returns the open video, `changed(video)` is called when
 *   its extraction has ended, and `say(text)` and `status(text)` announce and show what happens.
 */
export function connectUploads(handlers) {
  page = handlers;
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
    await page.open(sent);
    if (sent.state === "extracting") await extracted(sent.id);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("sending-problem").textContent = error.message;
    $("sending-problem").hidden = false;
    $("upload").disabled = false;
    $("progress").hidden = true;
  }
});

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

/** Wait until the features of an upload are extracted. */
async function extracted(id) {
  page.say("The features of the video are being extracted.");
  $("problem").hidden = true;
  for (;;) {
    const now = await api.video(id);
    if (page.current()?.id !== id) break;
    if (now.state !== "extracting") {
      page.status();
      page.changed(now);
      return;
    }
    page.status("Extracting the features of the video…");
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  page.status();
}
