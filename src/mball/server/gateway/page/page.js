"use strict";
// The key is in this variable alone: not in storage, a cookie or an address.
let key = "";
// Whatever comes from the server becomes text, never markup.
const at = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const RUNGS = [["device", "On the device"], ["dram", "In DRAM"], ["nvme", "On NVMe"], ["stopped", "Stopped"]];
const SAID = { device: "serves", dram: "its weights wait in DRAM", nvme: "its weights wait on NVMe",
  source: "its process waits, its weights are in its files" };
const MOST_LINES = 300, EVERY_MS = 2000, AGAIN_MS = 2000, COLOURS = 7;
const cards = new Map(), colours = new Map();
let operator = true, messages = [], answering = null, fetching = false;

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers, credentials: "omit" });
  if (response.ok) return response;
  let text = `${response.status}`;
  try { text = (await response.json()).error.message; } catch { /* the status says enough */ }
  throw new Refused(response.status, text);
}

function say(text, bad = false) {
  at("status").textContent = text;
  at("status").className = bad ? "bad" : "";
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let number = bytes || 0, unit = 0;
  while (number >= 1024 && unit < units.length - 1) { number /= 1024; unit += 1; }
  return `${number >= 100 || unit === 0 ? number.toFixed(0) : number.toFixed(1)} ${units[unit]}`;
}

function colour(name) {
  if (!colours.has(name)) colours.set(name, `c${colours.size % COLOURS}`);
  return colours.get(name);
}

function rungOf(model) {
  if (model.shown_as === "device" || model.shown_as === "dram" || model.shown_as === "nvme") return model.shown_as;
  if (model.shown_as === "starting" || model.shown_as === "stopping") {
    return RUNGS.some(([rung]) => rung === model.weights) ? model.weights : "stopped";
  }
  return "stopped";
}

function facts(model) {
  const found = [`${model.in_flight} running, ${model.queued} waiting`];
  if (model.rate * 60 >= 0.1) found.push(`${(model.rate * 60).toFixed(1)} requests a minute`);
  if (model.device_bytes) found.push(`${size(model.device_bytes)} on the device`);
  if (model.image_bytes) found.push(`image of ${size(model.image_bytes)}`);
  if (model.host_bytes) found.push(`${size(model.host_bytes)} of host memory`);
  if (model.last_swap_s) found.push(`last swap ${model.last_swap_s.toFixed(2)} s`);
  return found.join(" · ");
}

function card(name) {
  const made = make("article", "model"), row = make("div", "row");
  const parts = { made, name: make("h4", "", name), state: make("p"), facts: make("p"), error: make("p", "error"), buttons: {} };
  for (const verb of ["load", "unload", "pin"]) {
    const button = make("button", "", verb);
    button.type = "button";
    button.addEventListener("click", () => move(name, button));
    parts.buttons[verb] = button;
    row.append(button);
  }
  made.setAttribute("aria-label", name);
  made.append(parts.name, parts.state, parts.facts, parts.error, row);
  return parts;
}

async function move(name, button) {
  const verb = button.textContent;
  button.setAttribute("aria-busy", "true");
  say(`${name}: ${verb}`);
  try {
    await ask(`/mball/v1/models/${encodeURIComponent(name)}/${verb}`, { method: "POST" });
    say(`${name}: ${verb}, done`);
  } catch (error) { say(error.message, true); }
  button.removeAttribute("aria-busy");
  await refresh();
}

function showLadder(models) {
  const ladder = at("ladder");
  if (!ladder.children.length) {
    for (const [rung, title] of RUNGS) {
      const item = make("li", `rung ${rung}`);
      item.id = `rung-${rung}`;
      item.append(make("h3", "", title), make("p", "none", "none"));
      ladder.append(item);
    }
  }
  const focused = document.activeElement;
  for (const model of models) {
    if (!cards.has(model.name)) cards.set(model.name, card(model.name));
    const parts = cards.get(model.name), rung = at(`rung-${rungOf(model)}`);
    if (parts.made.parentElement !== rung) rung.append(parts.made);
    const pinned = model.pinned ? ", pinned" : "";
    parts.state.textContent = `${SAID[model.shown_as] || model.shown_as}${pinned}`;
    parts.facts.textContent = facts(model);
    parts.error.textContent = model.error || "";
    parts.error.hidden = !model.error;
    parts.buttons.pin.textContent = model.pinned ? "unpin" : "pin";
    for (const button of Object.values(parts.buttons)) button.setAttribute("aria-label", `${button.textContent} ${model.name}`);
  }
  const names = new Set(models.map((model) => model.name));
  for (const [name, parts] of cards) if (!names.has(name)) { parts.made.remove(); cards.delete(name); }
  for (const rung of ladder.children) rung.querySelector(".none").hidden = rung.querySelector(".model") !== null;
  // Who pressed a button goes on from it, also where its model has moved.
  if (focused !== document.activeElement && focused.isConnected) focused.focus();
}

function bar(title, total, owners) {
  const held = owners.filter(([, bytes]) => bytes > 0), used = held.reduce((sum, [, bytes]) => sum + bytes, 0);
  const made = make("div", "store"), line = make("div", "bar"), legend = make("ul", "legend");
  legend.setAttribute("role", "list");
  legend.style.listStyle = "none"; legend.style.padding = "0"; legend.style.margin = "0";
  for (const [name, bytes, className] of held) {
    const part = make("div", className);
    part.style.width = `${(100 * bytes) / Math.max(total, used, 1)}%`;
    line.append(part);
    legend.append(make("li", className, `${name} ${size(bytes)}`));
  }
  legend.append(make("li", "", `free ${size(Math.max(0, total - used))}`));
  line.setAttribute("aria-hidden", "true");
  made.append(make("h3", "", `${title}: ${size(used)} of ${size(total)}`), line, legend);
  return made;
}

function showBars(state) {
  const found = state.devices.map((device) => {
    const models = state.models.filter((model) => model.device === device.name);
    const owners = models.map((model) => [model.name, Math.max(model.device_bytes || 0, model.promised_bytes || 0), colour(model.name)]);
    return bar(device.name, device.limit_bytes, [...owners, ["other programs", device.foreign_bytes || 0, "c7"]]);
  });
  const images = state.models.map((model) => [model.name, model.image_bytes, colour(model.name)]);
  const workers = state.dram.worker_bytes;
  const kept = workers ? [...images, ["workers' layers and KV", workers, "c7"]] : images;
  found.push(bar(workers ? "DRAM" : "DRAM, images", state.dram.limit_bytes + workers, kept));
  if (state.swap && state.swap.state === "open") {
    const kept = [["images", state.swap.image_bytes, "c0"], ["KV blocks", state.swap.block_bytes, "c1"]];
    found.push(bar("NVMe", state.swap.total_bytes, kept));
  }
  at("bars").replaceChildren(...found);
}

function showModels(names) {
  const select = at("model");
  if (names.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => {
    const option = make("option", "", name);
    option.value = name;
    return option;
  }));
  if (names.includes(chosen)) select.value = chosen;
}

function showEvent(event) {
  const when = new Date(event.at * 1000), item = make("li"), time = make("time", "", when.toLocaleTimeString());
  time.dateTime = when.toISOString();
  item.append(time, make("b", "", event.model ? `${event.model}: ${event.kind}` : event.kind), event.reason || "");
  at("log").prepend(item);
  while (at("log").children.length > MOST_LINES) at("log").lastElementChild.remove();
}

async function refresh() {
  if (fetching || !operator) return;
  fetching = true;
  try {
    const state = await (await ask("/mball/v1/state")).json();
    showLadder(state.models);
    showBars(state);
    if (state.draining) say("the server shuts down", true);
  } catch (error) { say(error.message, true); }
  fetching = false;
}

// EventSource can't send a key.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", event = {};
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      const [, field, data] = line.match(/^([^:]*):? ?(.*)$/);
      if (line === "") { if (event.data !== undefined) yield event; event = {}; }
      else if (field === "data") event.data = event.data === undefined ? data : `${event.data}\n${data}`;
      else if (field) event[field] = data;
    }
  }
}

async function follow() {
  let last = "";
  for (;;) {
    try {
      const headers = last ? { "last-event-id": last } : {};
      const response = await ask(`/mball/v1/events${last ? "" : "?recent=50"}`, { headers });
      say("live");
      for await (const event of events(response)) {
        last = event.id || last;
        const told = JSON.parse(event.data);
        if (event.event === "dropped") break;
        if (event.event === "missed") showEvent({ at: Date.now() / 1000, kind: `${told.missed} events were missed` });
        else showEvent(told);
        refresh();
      }
    } catch (error) { say(`no events: ${error.message}`, true); }
    await new Promise((resolve) => { setTimeout(resolve, AGAIN_MS); });
  }
}

function line(who, text) {
  const made = make("p", who, text);
  at("said").append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

async function chat(event) {
  event.preventDefault();
  if (answering) return;
  answering = new AbortController();
  at("stop").disabled = false;
  messages.push({ role: "user", content: at("text").value });
  line("user", at("text").value);
  at("text").value = "";
  const answer = line("assistant", "…");
  let text = "";
  try {
    const body = JSON.stringify({ model: at("model").value, messages, stream: true });
    const headers = { "content-type": "application/json" };
    const response = await ask("/v1/chat/completions", { method: "POST", body, headers, signal: answering.signal });
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      text += part.choices?.[0]?.delta?.content || "";
      answer.textContent = text || "…";
      at("said").scrollTop = at("said").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") line("error", error.message);
  }
  if (text) messages.push({ role: "assistant", content: text });
  else { answer.remove(); messages.pop(); }
  answering = null;
  at("stop").disabled = true;
}

async function start() {
  try {
    const listed = await (await ask("/v1/models")).json();
    showModels(listed.data.map((model) => model.id));
    try { await ask("/mball/v1/state"); } catch (error) {
      if (error.status !== 403) throw error;
      operator = false;
    }
  } catch (error) {
    if (error.status === 401) {
      at("key-form").hidden = false;
      at("key").focus();
      say(key ? "this key is not known here" : "a key is asked for; one with admin: true sees the models' state", Boolean(key));
    } else { say(error.message, true); setTimeout(start, AGAIN_MS); }
    return;
  }
  at("key-form").hidden = true;
  document.querySelector("main").hidden = false;
  for (const section of document.querySelectorAll(".operator")) section.hidden = !operator;
  if (!operator) { say("this key may chat; one with admin: true sees the models' state"); return; }
  await refresh();
  setInterval(refresh, EVERY_MS);
  follow();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  at("key").value = "";
  start();
});
at("chat").addEventListener("submit", chat);
at("stop").addEventListener("click", () => answering?.abort());
at("clear").addEventListener("click", () => { answering?.abort(); messages = []; at("said").replaceChildren(); });
start();
