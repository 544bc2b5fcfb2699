// Builds elements; the only way text reaches the page is a text node, so nothing in it can become markup.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function replace(parent, ...children) {
  parent.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

// A row of radio buttons inside an existing fieldset; `choices` are [value, label] pairs.
export function segments(fieldset, name, choices, chosen, onchoice) {
  fieldset.querySelectorAll("label").forEach((label) => label.remove());
  for (const [value, label] of choices) {
    const input = h("input", { type: "radio", name, value, checked: String(value) === String(chosen) });
    input.addEventListener("change", () => onchoice(value));
    fieldset.append(h("label", null, input, h("span", null, label)));
  }
}

export function choose(fieldset, value) {
  for (const input of fieldset.querySelectorAll("input")) input.checked = input.value === String(value);
}
