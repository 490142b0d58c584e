// A text field that finds videos by name: a combobox with a list, as screen readers and keyboards know it.

import { clock } from "./timeline.js";

const PAUSE_MS = 120;

export class Picker {
  /** `find(text, signal)` returns `{total, videos}`; `choose(video)` and `fail(error)` are called. */
  constructor(input, list, { find, choose, fail }) {
    Object.assign(this, { input, list, find, choose, fail });
    this.videos = [];
    this.active = -1;
    this.asked = new AbortController();
    input.addEventListener("input", () => this.later());
    input.addEventListener("focus", () => input.select());
    input.addEventListener("click", () => list.hidden && this.open(""));
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("blur", () => this.close());
    // Kept from taking the focus, so that the list is still there when the press ends.
    list.addEventListener("pointerdown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => this.take(event.target.closest("li")?.dataset.index));
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.open(this.input.value.trim()), PAUSE_MS);
  }

  async open(text) {
    this.asked.abort();
    this.asked = new AbortController();
    let found;
    try {
      found = await this.find(text, this.asked.signal);
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
        ? `… and ${found.total - found.videos.length} more: type a part of the name.`
        : text ? "No video has this in its name." : "There is no data set here: send a video instead.";
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
  about.textContent = clock(video.duration, 0) + (video.media ? " · film" : "");
  item.append(name, about);
  return item;
}
