// What the page is made of: elements, numbers with units, and curves. No markup is ever made of a string.

const SVG = "http://www.w3.org/2000/svg";
const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "data") Object.assign(made.dataset, value);
    else if (key === "class") made.className = value;
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

// Only what differs is touched, so that nothing flickers and a selection stays.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const at = (seconds) => clock.format(seconds * 1000);

// The time of day, with the day where it is another one.
export function moment(seconds) {
  const then = new Date(seconds * 1000);
  return then.toDateString() === new Date().toDateString() ? at(seconds) : day.format(then);
}

// [number, unit] of a value; a dash for what is not known.
export function shown(value, unit) {
  if (value === undefined || value === null) return ["–", ""];
  if (unit === "s") return value < 1 ? [whole.format(value * 1000), "ms"] : [three.format(value), "s"];
  if (unit === "USD") return [`$${value !== 0 && value < 0.01 ? three.format(value) : value.toFixed(2)}`, ""];
  return [Math.abs(value) >= 1000 ? whole.format(value) : three.format(value), unit];
}

export function spoken(value, unit) {
  const [number, short] = shown(value, unit);
  return short ? `${number} ${short}` : number;
}

// A row of a list of figures: the term, and a value that is filled by `set`.
export class Figure {
  constructor(label, unit) {
    this.unit = unit;
    this.number = element("span");
    this.short = element("span", { class: "unit" });
    this.value = element("dd", {}, this.number, " ", this.short);
    this.node = element("div", {}, element("dt", {}, label), this.value);
  }

  set(value, tone = "") {
    const [number, short] = shown(value, this.unit);
    setText(this.number, number);
    setText(this.short, short);
    if ((this.value.dataset.tone ?? "") !== tone) this.value.dataset.tone = tone;
  }
}

function shape(name, properties) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(properties)) made.setAttribute(key, value);
  return made;
}

const WIDTH = 150;
const HEIGHT = 40;

// A curve of the last minutes; the newest point is at the right, and the height is that of the highest.
export class Curve {
  constructor(label, unit) {
    this.label = label;
    this.unit = unit;
    this.line = shape("path", { class: "line" });
    this.area = shape("path", { class: "area" });
    const base = shape("path", { class: "base", d: `M0 ${HEIGHT}H${WIDTH}` });
    this.picture = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.picture.append(base, this.area, this.line);
    this.most = element("span");
    this.node = element("figure", { class: "curve" }, this.picture,
      element("figcaption", {}, element("span", {}, label), this.most));
  }

  draw(points, room, minutes) {
    const highest = Math.max(...points, 0);
    const step = WIDTH / Math.max(1, room - 1);
    const left = WIDTH - step * (points.length - 1);
    const high = (value) => HEIGHT - 1 - (highest ? (value / highest) * (HEIGHT - 4) : 0);
    const path = points.map((value, index) => `${(left + index * step).toFixed(1)} ${high(value).toFixed(1)}`).join("L");
    this.line.setAttribute("d", path ? `M${path}` : "");
    this.area.setAttribute("d", path ? `M${left.toFixed(1)} ${HEIGHT}L${path}L${WIDTH} ${HEIGHT}Z` : "");
    setText(this.most, `max ${spoken(highest, this.unit)}`);
    const now = spoken(points.at(-1), this.unit);
    this.picture.setAttribute("aria-label", `${this.label} in the last ${minutes} minutes: now ${now}, at most ${spoken(highest, this.unit)}`);
  }
}
