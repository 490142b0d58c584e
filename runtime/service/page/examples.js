// Show videos of the data set to begin with, each with a sentence about it.

import { element } from "./dom.js";
import { clock } from "./timeline.js";

/** Fill a list with examples `{video, query}`; a click calls `choose(example)`. */
export function showExamples(list, examples, choose) {
  list.replaceChildren(
    ...examples.map((example) => {
      const button = element("button", "example");
      button.type = "button";
      if (example.video.media) button.append(poster(example.video));
      button.append(
        element("span", "name", example.video.name),
        element("span", "quiet", clock(example.video.duration, 0)),
      );
      if (example.query) button.append(element("span", "about", `“${example.query}”`));
      button.addEventListener("click", () => choose(example));
      return element("li", "", button);
    }),
  );
  list.hidden = !examples.length;
}

/** Return a picture of a video: the browser loads one frame of the file. */
function poster(video) {
  const picture = element("video");
  Object.assign(picture, { muted: true, playsInline: true, preload: "metadata", tabIndex: -1 });
  picture.setAttribute("aria-hidden", "true");
  picture.src = `${video.media}#t=${(video.duration / 3).toFixed(1)}`;
  picture.addEventListener("error", () => picture.remove());
  return picture;
}
