// Search for videos by name in a combobox with a list, by the ARIA pattern.

import { clock } from "./timeline.js";

const PAUSE_MS = 120;

export class Picker {
  /** `find(text, signal)` returns `{total, videos}`; `choose(video)` and `fail(error)` are called. */
  constructor(input, list, { find, choose, fail }) {
    Object.assign(this, { input, list, find, choose, fail });
    this.videos = [];
    this.active = -1;
    this.search = new AbortController();
    input.addEventListener("input", () => this.later());
    input.addEventListener("focus", () => input.select());
    input.addEventListener("click", () => list.hidden && this.open(""));
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("blur", () => this.close());
    // The list must not take the focus, or it would close before the click ends.
    list.addEventListener("pointerdown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => this.take(event.target.closest("li")?.dataset.index));
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.open(this.input.value.trim()), PAUSE_MS);
  }

  async open(text) {
    this.search.abort();
    this.search = new AbortController();
    let found;
    try {
      found = await this.find(text, this.search.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
      return;
    }
    if (document.activeElement !== this.input) return;
    this.videos = found.videos;
    this.list.replaceChildren(...found.videos.map((video, index) => option(video, index)));
    if (!found.videos.length || found.total > found.videos.length) {
      const note = document.createElement("li");
      note.className = "none";
      note.textContent = found.videos.length
        ? `… and ${found.total - found.videos.length} more. Type a part of the name.`
        : text ? "No name of a video contains this text." : "The service has no data set. Upload a video instead.";
      this.list.append(note);
    }
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.activate(text && found.videos.length ? 0 : -1);
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  activate(index) {
    this.active = index;
    for (const item of this.list.querySelectorAll("[role=option]")) {
      const here = Number(item.dataset.index) === index;
      item.setAttribute("aria-selected", String(here));
      if (here) {
        item.scrollIntoView({ block: "nearest" });
        this.input.setAttribute("aria-activedescendant", item.id);
      }
    }
  }

  key(event) {
    const last = this.videos.length - 1;
    if (event.key === "Escape") this.close();
    else if (event.key === "ArrowDown" && this.list.hidden) this.open("");
    else if (event.key === "ArrowDown") this.activate(Math.min(last, this.active + 1));
    else if (event.key === "ArrowUp") this.activate(Math.max(0, this.active - 1));
    else if (event.key === "Enter" && !this.list.hidden) this.take(this.active);
    else return;
    event.preventDefault();
  }

  take(index) {
    const video = this.videos[index];
    if (!video) return;
    this.close();
    this.choose(video);
  }
}

function option(video, index) {
  const item = document.createElement("li");
  item.id = `option-${index}`;
  item.dataset.index = index;
  item.setAttribute("role", "option");
  const name = document.createElement("span");
  name.textContent = video.name;
  const about = document.createElement("span");
  about.className = "quiet";
  about.textContent = clock(video.duration, 0) + (video.media ? " · video file" : "");
  item.append(name, about);
  return item;
}
