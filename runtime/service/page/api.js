// Send the requests of the page. Every failure is an Error whose message the page can show.

let key = sessionStorage.getItem("key") ?? "";
let promptForKey = async () => "";

/** Set the function that prompts for an API key; it is called with whether the service rejected another key. */
export function onKeyRequired(prompt) {
  promptForKey = prompt;
}

export class Problem extends Error {
  constructor(message, code = "") {
    super(message);
    this.code = code;
  }
}

function headers(more = {}) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function request(path, options = {}) {
  for (;;) {
    let response;
    try {
      response = await fetch(path, { ...options, headers: headers(options.headers) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The service cannot be reached. Check that it runs, and try again.", "unreachable");
    }
    if (response.status === 401) {
      await newKey();
      continue;
    }
    if (!response.ok) throw problemOf(await response.text(), response.status);
    return response;
  }
}

async function newKey() {
  key = await promptForKey(Boolean(key));
  sessionStorage.setItem("key", key);
}

function problemOf(body, status) {
  try {
    const { error } = JSON.parse(body);
    return new Problem(error.message, error.code);
  } catch {
    return new Problem(`The service responded with status ${status}. Try again.`);
  }
}

export async function model() {
  return (await request("/v1/model")).json();
}

/** Return videos to begin with, each with a sentence or null. */
export async function examples() {
  return (await (await request("/v1/examples")).json()).examples;
}

/** Return known words that start with a text. */
export async function words(prefix, signal) {
  const { total, words: items } = await (
    await request(`/v1/words?limit=8&prefix=${encodeURIComponent(prefix)}`, { signal })
  ).json();
  return { total, items };
}

/** Return the videos whose names contain a text. */
export async function videos(contains, signal) {
  const { total, videos: items } = await (
    await request(`/v1/videos?limit=50&contains=${encodeURIComponent(contains)}`, { signal })
  ).json();
  return { total, items };
}

export async function video(id) {
  return (await request(`/v1/videos/${encodeURIComponent(id)}`)).json();
}

/**
 * Return the moments of one query, best first, and its unknown words. If `always` is true, the moments may score below
 * the model's no-match threshold.
 */
export async function ground(id, query, count, always = false) {
  const response = await request("/v1/ground", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ video: id, query, top_k: count, always_answer: always }),
  });
  const unknown = JSON.parse(decodeURIComponent(response.headers.get("drn-unknown-words") ?? "%5B%5D"));
  const [answer] = await response.json();
  return { moments: answer.moments, unknown };
}

/** Return the answers to queries about a video as a file: "csv" has all moments, and "srt" the best ones. */
export async function answers(id, queries, count, format) {
  const response = await request(`/v1/ground?format=${format}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ video: id, query: queries, top_k: count }),
  });
  return response.blob();
}

/** Return a part of a video as an mp4 file. */
export async function clip(id, { start, end }) {
  return (await request(`/v1/videos/${encodeURIComponent(id)}/clip?start=${start}&end=${end}`)).blob();
}

/** Upload a file. `onProgress` gets the fraction that was sent, which only XMLHttpRequest reports. */
export function send(fields, onProgress, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return new Promise((resolve, reject) => {
    const upload = new XMLHttpRequest();
    upload.open("POST", "/v1/videos");
    for (const [name, value] of Object.entries(headers())) upload.setRequestHeader(name, value);
    upload.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    upload.onload = async () => {
      if (upload.status === 201) resolve(JSON.parse(upload.responseText));
      else if (upload.status === 401) await newKey().then(() => resolve(send(fields, onProgress, signal)), reject);
      else reject(problemOf(upload.responseText, upload.status));
    };
    upload.onerror = () => reject(new Problem("The upload failed. The service may have ended, or the file is too large."));
    upload.onabort = () => reject(new DOMException("Canceled.", "AbortError"));
    signal.addEventListener("abort", () => upload.abort());
    upload.send(form);
  });
}
