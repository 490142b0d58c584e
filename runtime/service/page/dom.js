// Create elements.

/** Return an element with a class and children, which are elements or texts. */
export function element(name, className = "", ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
