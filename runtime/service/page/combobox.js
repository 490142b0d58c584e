// Complete an input from a list that the service searches: a combobox by the ARIA pattern.

const PAUSE_MS = 120;

export class Combobox {
  /**
   * @param input - the input, with the role combobox.
   * @param list - the list, with the role listbox.
   * @param text - `text(isTyped)` returns the text to search for after typing, or when the list is opened by click or
   *   arrow key; null closes the list.
   * @param find - `find(text, signal)` returns `{total, items}`.
   * @param render - returns the content of an item's row.
   * @param note - `note(text, found)` returns the last row of the list, or "".
   * @param choose - is called with the chosen item.
   * @param fail - is called with an error.
   * @param selectsFirst - whether Enter takes the first item of a search.
   */
  constructor(input, list, { text, find, render, note, choose, fail, selectsFirst }) {
    Object.assign(this, { input, list, text, find, render, note, choose, fail, selectsFirst });
    this.items = [];
    this.active = -1;
    this.search = new AbortController();
    input.addEventListener("input", () => this.later());
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("blur", () => this.close());
    // The list must not take the focus, or it would close before the click ends.
    list.addEventListener("pointerdown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => this.take(event.target.closest("li")?.dataset.index));
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.open(this.text(true)), PAUSE_MS);
  }

  async open(text) {
    this.search.abort();
    if (text === null) {
      this.close();
      return;
    }
    this.search = new AbortController();
    let found;
    try {
      found = await this.find(text, this.search.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
      return;
    }
    if (document.activeElement !== this.input) return;
    this.items = found.items;
    const note = this.note(text, found);
    this.list.replaceChildren(...found.items.map((item, index) => this.row(item, index)), ...(note ? [noteRow(note)] : []));
    this.list.hidden = !this.list.children.length;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
    this.activate(this.selectsFirst && text && found.items.length ? 0 : -1);
  }

  row(item, index) {
    const row = document.createElement("li");
    row.id = `${this.list.id}-${index}`;
    row.dataset.index = index;
    row.setAttribute("role", "option");
    row.append(...this.render(item));
    return row;
  }

  close() {
    clearTimeout(this.timer);
    this.search.abort();
    this.list.hidden = true;
    this.active = -1;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  activate(index) {
    this.active = index;
    this.input.removeAttribute("aria-activedescendant");
    for (const row of this.list.querySelectorAll("[role=option]")) {
      const here = Number(row.dataset.index) === index;
      row.setAttribute("aria-selected", String(here));
      if (here) {
        row.scrollIntoView({ block: "nearest" });
        this.input.setAttribute("aria-activedescendant", row.id);
      }
    }
  }

  key(event) {
    const isOpen = !this.list.hidden;
    if (event.key === "Escape" && isOpen) this.close();
    else if (event.key === "ArrowDown" && !isOpen) this.open(this.text(false));
    else if (event.key === "ArrowDown") this.activate(Math.min(this.items.length - 1, this.active + 1));
    else if (event.key === "ArrowUp" && isOpen) this.activate(Math.max(0, this.active - 1));
    else if (event.key === "Enter" && isOpen && this.active >= 0) this.take(this.active);
    else return;
    event.preventDefault();
  }

  take(index) {
    const item = this.items[index];
    if (item === undefined) return;
    this.close();
    this.choose(item);
  }
}

function noteRow(text) {
  const row = document.createElement("li");
  row.className = "none";
  row.setAttribute("role", "presentation");
  row.textContent = text;
  return row;
}
