// The live page: signs in, keeps a WebSocket, applies what comes, and says when it is not fresh.

import { Curve, Figure, at, element, moment, setText } from "./draw.js";

const STORED = "citadel-live-key";
const STALE_SECONDS = 5;
const STATES = { up: "up", draining: "draining", down: "down", unknown: "unknown" };
const find = (id) => document.getElementById(id);

let socket = null;
let tries = 0;
let timer = 0;
let figures = null; // the newest, whole
let alerts = [];
let history = null;
let heard = 0; // when the last message came, by performance.now()
let lastPoint = 0;
const cards = new Map();

// The connection ------------------------------------------------------------------------------------------------------
function connect() {
  clearTimeout(timer);
  const key = sessionStorage.getItem(STORED);
  if (!key) return ask("");
  find("enter").hidden = true;
  find("leave").hidden = false;
  tell("wait", figures ? "Reconnecting" : "Connecting");
  const address = new URL("/live/ws", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const mine = new WebSocket(address);
  socket = mine;
  mine.onopen = () => mine.send(JSON.stringify({ type: "auth", key }));
  mine.onmessage = (message) => socket === mine && take(JSON.parse(message.data));
  mine.onclose = (event) => socket === mine && closed(event);
  return undefined;
}

function closed(event) {
  socket = null;
  if (event.code === 1008) return ask(event.reason === "insufficient_scope"
    ? "This key may not see the gateway: it lacks the scope read." : "This key is not known here, or not valid any more.");
  // soon, then less and less often, and not all pages in the same moment
  const wait = event.code === 1012 && !tries ? 200 : Math.min(10000, 500 * 2 ** tries);
  tries += 1;
  timer = setTimeout(connect, wait * (0.75 + Math.random() / 2));
  check();
  return undefined;
}

function again() {
  if (!socket && sessionStorage.getItem(STORED)) {
    tries = 0;
    connect();
  }
}

function ask(message) {
  leave();
  setText(find("wrong"), message);
  find("key").focus();
}

function leave() {
  sessionStorage.removeItem(STORED);
  clearTimeout(timer);
  const old = socket;
  socket = null;
  old?.close();
  figures = history = null;
  alerts = [];
  cards.clear();
  for (const id of ["models", "total", "alerts", "resolved"]) find(id).replaceChildren();
  find("board").hidden = true;
  find("leave").hidden = true;
  find("enter").hidden = false;
  setText(find("host"), "");
  setText(find("fresh"), "");
  tell("off", "Not signed in");
  document.title = "Citadel live";
}

// What comes ----------------------------------------------------------------------------------------------------------
function take(message) {
  heard = performance.now();
  if (message.type === "snapshot") {
    ({ figures, history, alerts } = message);
    tries = 0;
    lastPoint = figures.at;
    find("board").hidden = false;
    showAlerts();
  } else if (message.type === "delta") {
    figures = patched(figures, message.figures);
    addPoint();
  } else if (message.type === "alerts") {
    ({ alerts } = message);
    showAlerts();
  } else if (message.type === "error") {
    return; // the close that follows says what to do
  }
  show();
  check();
}

// A JSON merge patch (RFC 7396).
function patched(old, patch) {
  const made = { ...old };
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete made[name];
    else if (typeof value === "object" && !Array.isArray(value) && typeof made[name] === "object") made[name] = patched(made[name], value);
    else made[name] = value;
  }
  return made;
}

function addPoint() {
  if (figures.at - lastPoint < history.seconds - 0.5) return;
  lastPoint = figures.at;
  for (const [name, model] of Object.entries(figures.models)) {
    const points = (history.models[name] ??= []);
    points.push(history.fields.map((field) => (field === "first_token_p95" ? model.first_token_seconds?.p95 : model[field]) ?? 0));
    if (points.length > history.points) points.shift();
  }
}

// What is seen --------------------------------------------------------------------------------------------------------
function tell(state, text) {
  const status = find("status");
  status.dataset.state = state;
  setText(status, text);
}

function check() {
  if (!figures) return;
  const silent = (performance.now() - heard) / 1000;
  const stale = silent > STALE_SECONDS;
  document.body.classList.toggle("stale", stale);
  if (stale) tell("stale", `Stale: no data since ${at(figures.at)}`);
  else if (socket?.readyState === WebSocket.OPEN) tell("live", "Live");
  else tell("wait", "Reconnecting");
}

const TOTALS = [
  ["requests_per_second", "Requests", "/s"],
  ["output_tokens_per_second", "Tokens written", "/s"],
  ["inflight", "In flight", ""],
  ["queue", "Waiting", "", (value) => (value ? "warn" : "")],
  ["errors_per_minute", "Errors", "/min", (value) => (value ? "bad" : "")],
  ["cost_today_usd", "Cost today", "USD"],
];
const totals = TOTALS.map(([field, label, unit, tone]) => ({ field, tone, figure: new Figure(label, unit) }));

function show() {
  setText(find("host"), figures.host);
  const box = find("total");
  if (!box.children.length) box.append(...totals.map((one) => one.figure.node));
  for (const one of totals) one.figure.set(figures.total[one.field], one.tone?.(figures.total[one.field]) ?? "");
  const list = find("models");
  for (const name of [...cards.keys()]) {
    if (!(name in figures.models)) {
      cards.get(name).node.remove();
      cards.delete(name);
    }
  }
  for (const [name, model] of Object.entries(figures.models)) {
    if (!cards.has(name)) {
      cards.set(name, new Card(name));
      list.append(cards.get(name).node);
    }
    cards.get(name).show(model, history.models[name] ?? []);
  }
  const workers = figures.workers === 1 ? "1 worker" : `${figures.workers} workers`;
  setText(find("fresh"), `${at(figures.at)} · ${workers} · ${figures.total.connections ?? 0} connections · rates of 10 s, times of 1 min, curves of 5 min`);
}

class Card {
  constructor(name) {
    this.state = element("span", { class: "state" });
    this.reason = element("p", { class: "reason", hidden: true });
    this.tokens = new Curve("Tokens", "/s");
    this.first = new Curve("First token", "s");
    this.rows = {
      inflight: new Figure("In flight", ""),
      queue: new Figure("Waiting", ""),
      requests_per_second: new Figure("Requests", "/s"),
      output_tokens_per_second: new Figure("Written", "tok/s"),
      input_tokens_per_second: new Figure("Read", "tok/s"),
      cost_today_usd: new Figure("Cost today", "USD"),
      first50: new Figure("First token p50", "s"),
      first95: new Figure("First token p95", "s"),
      limited_per_minute: new Figure("Limited", "/min"),
      whole50: new Figure("Reply p50", "s"),
      whole95: new Figure("Reply p95", "s"),
      errors_per_minute: new Figure("Errors", "/min"),
    };
    this.backends = element("ul", { class: "backends", ariaLabel: "Engines" });
    this.node = element("li", { data: { model: name } },
      element("div", { class: "top" }, element("h3", {}, name), this.state),
      this.reason,
      element("div", { class: "curves" }, this.tokens.node, this.first.node),
      element("dl", {}, ...Object.values(this.rows).map((row) => row.node)),
      this.backends);
  }

  show(model, points) {
    this.state.dataset.state = model.state;
    setText(this.state, STATES[model.state] ?? model.state);
    this.reason.hidden = !model.draining.length;
    setText(this.reason, `Takes no new requests: drained by ${model.draining.join(" and ")}`);
    for (const [field, row] of Object.entries(this.rows)) row.set(model[field], this.tone(field, model[field]));
    this.rows.first50.set(model.first_token_seconds?.p50);
    this.rows.first95.set(model.first_token_seconds?.p95);
    this.rows.whole50.set(model.duration_seconds?.p50);
    this.rows.whole95.set(model.duration_seconds?.p95);
    this.curve(this.tokens, points, "output_tokens_per_second");
    this.curve(this.first, points, "first_token_p95");
    const labels = Object.entries(model.backends).map(([label, up]) => `${up ? "●" : "✕"} ${label} ${up ? "up" : "down"}`);
    if (labels.join() !== this.labels) {
      this.labels = labels.join();
      this.backends.replaceChildren(...Object.entries(model.backends).map(([label, up], index) =>
        element("li", { data: { up: up ? "yes" : "no" } }, labels[index])));
    }
  }

  tone(field, value) {
    if (!value) return "";
    return { errors_per_minute: "bad", queue: "warn", limited_per_minute: "warn" }[field] ?? "";
  }

  curve(curve, points, field) {
    const index = history.fields.indexOf(field);
    curve.draw(points.map((point) => point[index]), history.points, Math.round((history.points * history.seconds) / 60));
  }
}

function showAlerts() {
  const firing = alerts.filter((alert) => alert.status === "firing");
  const over = alerts.filter((alert) => alert.status === "resolved");
  list(find("alerts"), firing.length ? firing : [null]);
  find("past").hidden = !over.length;
  setText(find("past").firstElementChild, `${over.length} resolved in the last day`);
  list(find("resolved"), over);
  document.title = firing.length ? `(${firing.length}) Citadel live` : "Citadel live";
}

// What is seen of an alert; that it was sent once more is not.
const mark = (alert) => JSON.stringify({ ...alert, seen: 0 });

// Entries that stay as they are stay where they are: a screen reader reads out what was put in.
function list(box, wanted) {
  const known = new Map([...box.children].map((node) => [node.dataset.entry, node]));
  const nodes = wanted.map((alert) => known.get(mark(alert)) ?? entry(alert));
  for (const node of [...box.children]) if (!nodes.includes(node)) node.remove();
  nodes.forEach((node, index) => {
    if (box.children[index] !== node) box.insertBefore(node, box.children[index] ?? null);
  });
}

function entry(alert) {
  if (!alert) return element("li", { class: "calm", data: { entry: mark(alert) } }, "No alert is firing.");
  const { labels, annotations } = alert;
  const severity = labels.severity ?? "";
  const firing = alert.status === "firing";
  const when = firing ? `since ${moment(alert.starts)}` : `resolved ${moment(alert.ends)}`;
  const node = element("li", { class: "alert", data: { severity: firing ? severity : "", name: labels.alertname ?? "", entry: mark(alert) } },
    element("div", { class: "top" },
      element("span", { class: "severity" }, severity || "alert"),
      element("strong", {}, labels.alertname ?? "without a name"),
      element("span", { class: "quiet" }, [labels.model ?? labels.model_name, labels.instance, when].filter(Boolean).join(" · "))));
  const text = annotations.summary ?? annotations.description;
  if (text) node.append(element("p", {}, text));
  if (/^https?:\/\//.test(annotations.runbook_url ?? "")) {
    node.append(element("p", {}, element("a", { href: annotations.runbook_url, target: "_blank", rel: "noopener noreferrer" }, "Runbook")));
  }
  return node;
}

find("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = find("key").value.trim();
  find("key").value = "";
  setText(find("wrong"), "");
  if (key) {
    sessionStorage.setItem(STORED, key);
    tries = 0;
    connect();
  }
});
find("leave").addEventListener("click", () => {
  leave();
  find("key").focus();
});
addEventListener("online", again);
document.addEventListener("visibilitychange", () => document.hidden || again());
setInterval(check, 1000);
connect();
