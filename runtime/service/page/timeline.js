// Draw moments on a timeline: one track per query, and one playhead.

/** Format a time: 0:07.5, 12:03.0, 1:02:03.0. */
export function clock(seconds, decimals = 1) {
  const ticks = Math.round(seconds * 10 ** decimals);
  const whole = Math.floor(ticks / 10 ** decimals);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  const text = hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
  return decimals ? `${text}.${String(ticks % 10 ** decimals).padStart(decimals, "0")}` : text;
}

/** Return the seconds between ticks for at most `maxTicks` ticks. */
export function tickStep(duration, maxTicks) {
  const steps = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];
  return steps.find((step) => duration / step <= maxTicks) ?? duration;
}

export class Timeline {
  /** A click on a moment calls `choose(row, rank)`, and elsewhere `seek(seconds)`. */
  constructor(root, { seek, choose }) {
    this.root = root;
    [this.rows, this.axis, this.head] = ["#rows", "#axis", "#head"].map((name) => root.querySelector(name));
    this.duration = 0;
    root.addEventListener("click", (event) => {
      const bar = event.target.closest(".bar");
      if (bar) choose(Number(bar.dataset.row), Number(bar.dataset.rank));
      else seek(this.secondsAt(event.clientX));
    });
    new ResizeObserver(() => this.drawAxis()).observe(root);
  }

  secondsAt(x) {
    const { left, width } = this.root.getBoundingClientRect();
    return Math.min(1, Math.max(0, (x - left) / width)) * this.duration;
  }

  show(duration) {
    this.duration = duration;
    this.root.hidden = !(duration > 0);
    this.drawAxis();
    this.at(0);
  }

  /** Draw answers `{color, moments}`; `chosen` is `[row, rank]` or null. Doubtful moments are hatched. */
  draw(answers, chosen, isDoubtful) {
    this.rows.replaceChildren(...answers.map((answer, row) => this.track(answer, row, chosen, isDoubtful)));
  }

  track(answer, row, chosen, isDoubtful) {
    const { color, number } = answer;
    const moments = answer.moments ?? [];
    const track = document.createElement("div");
    track.className = "track";
    track.style.setProperty("--color", color);
    track.setAttribute("aria-hidden", "true");
    const top = Math.max(...moments.map((moment) => moment.score), 1e-9);
    // The best moment is drawn last, over the others.
    for (const rank of [...moments.keys()].reverse()) {
      const { start, end, score } = moments[rank];
      const bar = document.createElement("div");
      const here = chosen !== null && chosen[0] === row && chosen[1] === rank;
      bar.className = "bar";
      bar.classList.toggle("chosen", here);
      bar.classList.toggle("doubtful", isDoubtful(moments[rank]));
      bar.dataset.row = row;
      bar.dataset.rank = rank;
      bar.style.left = `${(100 * start) / this.duration}%`;
      bar.style.width = `${(100 * (end - start)) / this.duration}%`;
      // The best moment is opaque, and the others fade with their score.
      bar.style.opacity = here ? 1 : rank ? 0.12 + 0.26 * (score / top) : 0.95;
      if (here) bar.style.zIndex = 1;
      track.append(bar);
    }
    const tag = document.createElement("span");
    tag.className = "tag";
    tag.textContent = number;
    track.append(tag);
    return track;
  }

  drawAxis() {
    if (!(this.duration > 0)) return;
    const step = tickStep(this.duration, Math.max(2, this.root.clientWidth / 80));
    const ticks = [];
    for (let time = 0; time < this.duration - 0.6 * step; time += step) ticks.push(time);
    ticks.push(this.duration);
    this.axis.replaceChildren(
      ...ticks.map((time) => {
        const tick = document.createElement("span");
        tick.textContent = clock(time, step < 1 || time === this.duration ? 1 : 0);
        tick.style.left = `${(100 * time) / this.duration}%`;
        return tick;
      }),
    );
  }

  /** Move the playhead. */
  at(seconds) {
    this.head.style.left = `${(100 * Math.min(seconds, this.duration)) / (this.duration || 1)}%`;
  }
}
