// What the page asks of the service. Every problem is an Error whose message can be shown as it stands.

let key = sessionStorage.getItem("key") ?? "";
let wantKey = async () => "";

/** Say how a key is asked for, once the service wants one. */
export function onKeyWanted(ask) {
  wantKey = ask;
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
      throw new Problem("The service cannot be reached; it may have ended. Try again.", "unreachable");
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
  key = await wantKey();
  sessionStorage.setItem("key", key);
}

function problemOf(body, status) {
  try {
    const { error } = JSON.parse(body);
    return new Problem(error.message, error.code);
  } catch {
    return new Problem(`The service answered with status ${status}; try again.`);
  }
}

export async function health() {
  return (await request("/healthz")).json();
}

/** Videos whose names contain a text. */
export async function videos(contains, signal) {
  return (await request(`/v1/videos?limit=50&contains=${encodeURIComponent(contains)}`, { signal })).json();
}

export async function video(id) {
  return (await request(`/v1/videos/${encodeURIComponent(id)}`)).json();
}

/** The moments of one sentence, best first, and the words that the model does not know. */
export async function ground(id, query, count) {
  const response = await request("/v1/ground", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ video: id, query, top_k: count }),
  });
  const unknown = JSON.parse(decodeURIComponent(response.headers.get("drn-unknown-words") ?? "%5B%5D"));
  const [answer] = await response.json();
  return { moments: answer.moments, unknown };
}

/** Send a file; `told` hears the share that has gone. Only XMLHttpRequest tells of it. */
export function send(fields, told, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return new Promise((resolve, reject) => {
    const asked = new XMLHttpRequest();
    asked.open("POST", "/v1/videos");
    for (const [name, value] of Object.entries(headers())) asked.setRequestHeader(name, value);
    asked.upload.onprogress = (event) => event.lengthComputable && told(event.loaded / event.total);
    asked.onload = async () => {
      if (asked.status === 201) resolve(JSON.parse(asked.responseText));
      else if (asked.status === 401) await newKey().then(() => resolve(send(fields, told, signal)), reject);
      else reject(problemOf(asked.responseText, asked.status));
    };
    asked.onerror = () => reject(new Problem("The file could not be sent; the service may have ended, or it is too large."));
    asked.onabort = () => reject(new DOMException("Given up.", "AbortError"));
    signal.addEventListener("abort", () => asked.abort());
    asked.send(form);
  });
}
