"use strict";
// Draws the episodes of the page. Text comes into the document as text nodes only.

const VERDICTS = ["SKIP", "WEAK", "STRONG", "DET_FAIL"];
const PIECE = 400; // tokens drawn at once
const LONG_TEXT = 4000; // characters; of a longer text this many are shown at first

const byId = (id) => document.getElementById(id);
const index = JSON.parse(byId("index").textContent);
const NOT_FINITE = "not finite"; // JSON has null for it, or the name that other writers give it
const isNumber = (x) => typeof x === "number";
const has = (x) => x !== undefined && x !== null && x !== "";

/** An element. Properties are attributes, or listeners where they are functions. */
function el(name, properties, ...children) {
  const svg = ["svg", "g", "rect", "circle", "path", "line", "text", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(properties || {})) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(2).filter((child) => child instanceof Node || (typeof child === "string" && child)));
  return made;
}

/** A number with three digits; a NaN or an infinity is a string in the file. */
function digits(x) {
  if (!isNumber(x)) return String(x);
  if (x !== 0 && Math.abs(x) < 5e-5) return "≈ 0";
  const rounded = Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : Number(Number(x.toPrecision(3)).toFixed(4));
  return String(rounded).replace("-", "−");
}

const plural = (n, word) => `${digits(n)} ${word}${n === 1 ? "" : "s"}`;

/** A verdict's shape: ring, half, disc, cross. */
function mark(verdict, x = 7, y = 7) {
  const r = 4.5, half = `M${x} ${y - r}A${r} ${r} 0 0 0 ${x} ${y + r}Z`;
  const cross = `M${x - 4} ${y - 4}L${x + 4} ${y + 4}M${x + 4} ${y - 4}L${x - 4} ${y + 4}`;
  return el("g", { class: `mark ${VERDICTS.includes(verdict) ? verdict : "other"}` },
    verdict === "DET_FAIL" ? el("path", { d: cross }) : el("circle", { cx: x, cy: y, r }),
    verdict === "WEAK" && el("path", { class: "filled", d: half }),
  );
}

const verdictChip = (verdict) => el("span", { class: `chip ${verdict}` },
  el("svg", { width: 14, height: 14, "aria-hidden": "true" }, mark(verdict)), verdict);

// --- The list of episodes

const list = byId("list"), filters = byId("filters");
const rows = []; // one <li> an episode
const parsed = new Map(); // episodes that were opened
let chosen = -1;

function episodeOf(k) {
  if (!parsed.has(k)) parsed.set(k, JSON.parse(byId(`episode-${k}`).textContent));
  return parsed.get(k);
}

const when = (entry) => [entry.who, has(entry.update) && `update ${entry.update}`].filter(has).filter(Boolean).join(", ");

function outcome(success) {
  if (!has(success)) return el("span", { class: "outcome", "aria-hidden": "true" }, "·");
  return el("span", { class: `outcome ${success ? "won" : "lost"}`, role: "img",
    "aria-label": success ? "success" : "no success" }, success ? "✓" : "✗");
}

function row(entry, k) {
  const facts = [when(entry), plural(entry.turns, "turn"), entry.failures && `${entry.failures} failed`];
  const button = el("button", { type: "button", click: () => { choose(k); showList(false); } },
    outcome(entry.success),
    el("span", { class: "title" }, entry.title),
    el("span", { class: "facts" }, facts.filter(Boolean).join(" · ")),
  );
  return el("li", { "data-episode": k }, button);
}

const searched = new Map();
function textOf(k) {
  if (!searched.has(k)) {
    const { messages, task } = episodeOf(k);
    const texts = [...Object.values(task || {}), ...messages.map((m) => m.content)];
    searched.set(k, texts.join("\n").toLowerCase());
  }
  return searched.get(k);
}

/** Whether the filters let an episode through. */
function passes(entry, k) {
  const { success, verdict, failures, when: time, text } = filters.elements;
  return (!success.value || String(Boolean(entry.success)) === success.value)
    && (!verdict.value || entry.verdicts.includes(verdict.value))
    && (!failures.value || String(entry.failures > 0) === failures.value)
    && (!time.value || when(entry) === time.value)
    && (!text.value || textOf(k).includes(text.value.toLowerCase()));
}

function applyFilters() {
  index.episodes.forEach((entry, k) => { rows[k].hidden = !passes(entry, k); });
  const shown = rows.filter((r) => !r.hidden).length, all = rows.length;
  byId("count").textContent = shown === all ? plural(all, "episode") : `${digits(shown)} of ${plural(all, "episode")}`;
  if (shown && rows[chosen]?.hidden !== false) choose(rows.findIndex((r) => !r.hidden));
  placeButtons();
}

function fillFilters() {
  const entries = index.episodes, present = new Set(entries.flatMap((e) => e.verdicts));
  const options = {
    success: entries.some((e) => has(e.success)) && [["true", "success"], ["false", "no success"]],
    verdict: VERDICTS.filter((v) => present.has(v)).map((v) => [v, `has ${v}`]),
    failures: entries.some((e) => e.failures) && [["true", "has failed turns"], ["false", "no failed turn"]],
    when: [...new Set(entries.map(when))].filter(has).map((text) => [text, text]),
  };
  const any = { success: "any outcome", verdict: "any verdict", failures: "any failures", when: "any update" };
  for (const [name, found] of Object.entries(options)) {
    const choices = [["", any[name]], ...(found || [])];
    filters.elements[name].append(...choices.map(([value, text]) => el("option", { value }, text)));
    filters.elements[name].hidden = choices.length < (name === "when" ? 3 : 2);
  }
}

/** The next shown episode in a direction, or −1. */
function neighbour(step) {
  for (let k = chosen + step; k >= 0 && k < rows.length; k += step) if (!rows[k].hidden) return k;
  return -1;
}

function placeButtons() {
  const shown = rows.filter((r) => !r.hidden);
  byId("place").textContent = `${shown.indexOf(rows[chosen]) + 1} of ${shown.length}`;
  byId("previous").disabled = neighbour(-1) < 0;
  byId("next").disabled = neighbour(1) < 0;
}

function showList(open) {
  document.body.classList.toggle("list-open", open);
  byId("open").setAttribute("aria-expanded", open);
  if (open) filters.elements.text.focus();
}

// --- One episode, drawn in pieces

let episode, tokens, turnOf, firstToken; // the chosen one; its student's tokens as columns
let cards = [], spans = [], pending = [], timer = 0;

function choose(k) {
  if (k < 0) return;
  rows[chosen]?.firstChild.removeAttribute("aria-current");
  chosen = k;
  rows[k].firstChild.setAttribute("aria-current", "true");
  rows[k].scrollIntoView({ block: "nearest" });
  placeButtons();
  hideCard();
  episode = episodeOf(k);
  tokens = episode.tokens || { text: [], turn: [] };
  turnOf = tokens.turn;
  firstToken = new Map();
  turnOf.forEach((turn, i) => { if (!firstToken.has(turn)) firstToken.set(turn, i); });
  [cards, spans] = [[], []];
  currentTurn = 0;
  byId("turns").replaceChildren();
  byId("head").replaceChildren(...head(index.episodes[k]));
  fillColours();
  drawChart();
  pending = plan();
  scrollTo(0, 0);
  drawFor(30);
}

/** What is left to draw, in order: functions that draw a turn, a piece of its tokens, the end. */
function plan() {
  const jobs = [];
  let before = [], k = 0;
  for (const message of episode.messages) {
    if (message.role !== "assistant") { before.push(message); continue; }
    const turn = k++, given = before;
    before = [];
    let box;
    jobs.push(() => { box = drawTurn(turn, given, message.content); });
    const start = firstToken.get(turn);
    if (start === undefined) continue;
    let end = start;
    while (turnOf[end] === turn) end++;
    for (let at = start; at < end; at += PIECE) {
      jobs.push(() => drawTokens(box, at, Math.min(at + PIECE, end)));
    }
  }
  const after = before;
  if (after.length) jobs.push(() => byId("turns").append(el("section", { class: "turn after" },
    el("div", { class: "gutter" }, "end"), el("div", { class: "body" }, after.map(said)))));
  return jobs;
}

/** Draws for some milliseconds, then goes on when the browser has handled what the user did. */
function drawFor(milliseconds) {
  clearTimeout(timer);
  const start = performance.now();
  do pending.shift()?.(); while (pending.length && performance.now() - start < milliseconds);
  if (pending.length) timer = setTimeout(drawFor, 0, 12);
  document.documentElement.toggleAttribute("data-drawn", !pending.length);
}

function drawUntil(isThere) {
  while (pending.length && !isThere()) pending.shift()();
}

function mean(values) {
  const numbers = values.filter(isNumber);
  return numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : undefined;
}

/** The mean of a column of the student's tokens over a turn. */
function turnMean(column, turn) {
  const start = firstToken.get(turn);
  if (!tokens[column] || start === undefined) return undefined;
  let end = start;
  while (turnOf[end] === turn) end++;
  return mean(tokens[column].slice(start, end));
}

function head(entry) {
  const task = episode.task || {};
  const facts = [
    task.id !== entry.title && task.id, when(entry), has(task.split) && `${task.split}${has(task.index) ? ` ${task.index}` : ""}`,
    has(entry.success) && (entry.success ? "success" : "no success"),
    has(episode.score) && `score ${digits(episode.score)}`,
    has(episode.end) && episode.end !== "success" && `ended by ${episode.end}`,
    ...Object.entries(episode.measures || {}).map(([name, value]) => `${name} ${digits(value)}`),
    plural(entry.turns, "turn"), turnOf.length && plural(turnOf.length, "token"),
    has(episode.z) && `z ${digits(episode.z)}`,
  ];
  return [
    el("h2", {}, outcome(entry.success), " ", entry.title),
    el("p", { class: "facts" }, facts.filter(has).filter(Boolean).map((fact) => el("span", {}, fact))),
    entry.without_top && el("p", { class: "note" }, "The top five tokens of this episode were left out."),
  ].filter(Boolean);
}

/** A text, cut with a button where it is long. */
function text(content, className) {
  const box = el("div", { class: `text ${className}` }, content.slice(0, LONG_TEXT));
  if (content.length > LONG_TEXT) {
    const more = el("button", { type: "button", click: () => box.replaceChildren(content) },
      `show all ${digits(content.length)} characters`);
    box.append("… ", more);
  }
  return box;
}

function said(message) {
  if (message.role !== "system") return text(message.content, "observation");
  return el("details", { class: "system" }, el("summary", {}, "System prompt"), text(message.content, "observation"));
}

function judgeScores(scores) {
  const words = Object.entries(scores);
  const sum = words.reduce((total, [, score]) => total + (isNumber(score) ? Math.exp(score) : 0), 0);
  return el("span", { class: "scores" }, el("span", { class: "key" }, "judge, nats"), words.map(([word, score]) => {
    const share = isNumber(score) && sum ? Math.exp(score) / sum : 0;
    const bar = el("span", { class: "bar" });
    bar.style.setProperty("--share", share);
    return el("span", { class: "score", title: `${word}: ${digits(100 * share)} % of the three words` },
      word, bar, el("b", {}, digits(score)));
  }));
}

function weightOf(info, k) {
  const weight = turnMean("weight", k);
  if (!has(weight)) return undefined;
  const factors = [["z", episode.z], ["i", info.intervention], ["c", info.confidence]];
  if (!isNumber(weight) || !factors.every(([, value]) => isNumber(value))) return digits(weight);
  const product = factors.reduce((all, [, value]) => all * value, 1);
  if (Math.abs(weight - product) > 0.01 * product) factors.push(["e", weight / product]); // its mean
  return `${digits(weight)} = ${factors.map(([name, value]) => `${name} ${digits(value)}`).join(" · ")}`;
}

function turnFacts(info, k) {
  const fact = (name, value, className) => has(value)
    && el("span", { class: `fact ${className || ""}` }, el("span", { class: "key" }, name), " ", value);
  return [
    has(info.verdict) && verdictChip(info.verdict),
    info.judge && judgeScores(info.judge),
    fact("confidence", has(info.confidence) ? digits(info.confidence) : ""),
    fact("weight", weightOf(info, k)),
    fact("divergence", has(turnMean("divergence", k)) ? `${digits(turnMean("divergence", k))} nats` : ""),
    has(info.label) && el("span", { class: "fact" }, el("span", { class: "key" }, "environment"), " ", verdictChip(info.label)),
    fact("action", info.action, "action"),
    fact("failed", info.failure, "failed"),
    info.actor !== "student" && fact("written by", info.actor),
    info.stop !== "stop_token" && fact("stopped by", info.stop),
  ].filter(Boolean);
}

function drawTurn(k, before, response) {
  const info = (episode.turns || [])[k] || {};
  const box = firstToken.has(k) ? el("div", { class: "text response tokens" }) : text(response, "response");
  const facts = turnFacts(info, k);
  const card = el("section", { class: `turn ${info.actor || ""}`, "aria-label": `Turn ${k}`, tabindex: -1 },
    el("div", { class: "gutter" }, String(k)),
    el("div", { class: "body" }, before.map(said),
      has(info.aside) && el("div", { class: "aside" }, el("span", { class: "key" }, "to the teacher alone"),
        text(info.aside, "observation")), box,
      facts.length && el("p", { class: "facts" }, facts)));
  cards[k] = card;
  byId("turns").append(card);
  return box;
}

function drawTokens(box, start, end) {
  const piece = document.createDocumentFragment();
  for (let i = start; i < end; i++) {
    const span = document.createElement("span");
    span.textContent = tokens.text[i];
    span.dataset.token = i;
    span.tabIndex = firstToken.get(turnOf[i]) === i ? 0 : -1;
    if (tokens.text[i].includes("\n")) span.className = "newline";
    spans[i] = span;
    paint(i);
    piece.append(span);
  }
  box.append(piece);
}

// --- Colours

const difference = (a, b) => isNumber(a) && isNumber(b) ? a - b : undefined;
const COLOURS = {
  divergence: { name: "Divergence", unit: "nats", of: (i) => tokens.divergence?.[i] },
  weight: { name: "Weight", unit: "", of: (i) => tokens.weight?.[i] },
  log_ratio: { name: "Log-ratio", unit: "nats",
    of: (i) => difference(tokens.student_logprob?.[i], tokens.teacher_logprob?.[i]) },
  agrees: { name: "Agreement", unit: "", of: (i) => tokens.agrees?.[i] },
};
let colour = "divergence";

function available() {
  const needs = { log_ratio: ["student_logprob", "teacher_logprob"] };
  return Object.keys(COLOURS).filter((name) => (needs[name] || [name]).every((column) => tokens[column]));
}

function fillColours() {
  const names = available(), field = byId("colours").querySelector("fieldset");
  byId("colours").hidden = !names.length;
  if (names.length && !names.includes(colour)) colour = names[0];
  field.querySelectorAll("label").forEach((label) => label.remove());
  field.append(...names.map((name) => el("label", {},
    el("input", { type: "radio", name: "colour", value: name, checked: name === colour, change: () => setColour(name) }),
    el("span", {}, COLOURS[name].name))));
  drawLegend();
}

function setColour(name) {
  colour = name;
  byId("colours").querySelectorAll("input").forEach((input) => { input.checked = input.value === name; });
  drawLegend();
  for (const i of spans.keys()) paint(i);
}

/** How strong a value's colour is, 0 to 1. Few tokens have most of the divergence, hence the root. */
const strength = (value) => Math.min(Math.abs(value) / index.scales[colour], 1) ** (colour === "weight" ? 1 : 0.5);

/** Colours a token: above 0 warm, below 0 cool, stronger up to the scale's end. */
function paint(i) {
  const span = spans[i], value = COLOURS[colour].of(i);
  if (!span) return;
  span.classList.toggle("differs", colour === "agrees" && value === false);
  span.classList.toggle("odd", typeof value === "string" || value === null); // not finite
  span.classList.toggle("below", value < 0);
  const size = colour === "agrees" ? (value === false ? 0.6 : 0) : isNumber(value) ? strength(value) : 0;
  if (size < 0.02) span.style.removeProperty("--heat");
  else span.style.setProperty("--heat", `${Math.round(100 * size)}%`);
}

function drawLegend() {
  const { unit } = COLOURS[colour], end = index.scales[colour] ?? 1, legend = byId("legend");
  const swatch = (className, heat, words = "") => {
    const made = el("span", { class: `swatch ${className}` }, words);
    made.style.setProperty("--heat", heat);
    return made;
  };
  if (colour === "agrees") {
    legend.replaceChildren(swatch("differs", "60%", "token"), "first choices of teacher and student differ");
    return;
  }
  const signed = index.signed.includes(colour), power = colour === "weight" ? 1 : 2;
  const shades = signed ? [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1] : [0, 0.25, 0.5, 0.75, 1];
  const notes = { weight: "0: teaches nothing", log_ratio: "student − teacher; warm: less likely for the teacher" };
  legend.replaceChildren(el("span", { class: "ramp" }, shades.map((shade) =>
    swatch(shade < 0 ? "below" : "", `${100 * Math.abs(shade)}%`, digits(Math.sign(shade) * end * Math.abs(shade) ** power)))),
    unit, el("span", { class: "note" }, notes[colour] || ""));
}

// --- The chart of divergence and verdicts by turn

function drawChart() {
  const figure = byId("chart"), turns = episode.turns || [];
  const count = index.episodes[chosen].turns;
  const divergence = Array.from({ length: count }, (_, k) => turnMean("divergence", k));
  const marked = ["verdict", "label"].filter((name) => turns.some((turn) => has(turn[name])));
  const bars = divergence.some(has);
  figure.hidden = !bars && !marked.length;
  if (figure.hidden) return;
  const left = 96, room = figure.clientWidth - left - 8, step = Math.max(13, Math.min(34, room / count)), tall = bars ? 64 : 4;
  const top = Math.max(...divergence.filter(isNumber), 1e-9), low = tall + 8 + 20 * marked.length;
  const width = left + step * count + 8, names = { verdict: "verdict", label: "environment" };
  const label = (x, y, words, anchor = "end") => el("text", { x, y, "text-anchor": anchor }, words);
  const column = (k) => {
    const x = left + step * k, height = Math.max(0, ((divergence[k] || 0) / top) * (tall - 10));
    const info = turns[k] || {};
    const about = [`turn ${k}`, has(divergence[k]) && `divergence ${digits(divergence[k])} nats`, info.verdict,
      has(info.label) && `environment: ${info.label}`, has(info.failure) && `failed: ${info.failure}`];
    return el("g", { class: "column", "data-turn": k, click: () => goToTurn(k) },
      el("title", {}, about.filter(Boolean).join(", ")),
      el("rect", { class: "hit", x, y: 0, width: step, height: low + 16 }),
      bars && el("rect", { class: "value", x: x + step * 0.18, y: tall - height, width: step * 0.64, height, rx: 1.5 }),
      marked.map((name, line) => has(info[name]) && mark(info[name], x + step / 2, tall + 14 + 20 * line)),
      (step > 18 || k % 5 === 0) && label(x + step / 2, low + 10, String(k), "middle"));
  };
  const summary = divergence.map((value, k) =>
    `${k}: ${[has(value) && `${digits(value)} nats`, turns[k]?.verdict].filter(Boolean).join(" ")}`);
  figure.replaceChildren(el("svg", { width, height: low + 16, viewBox: `0 0 ${width} ${low + 16}`, role: "img",
    "aria-label": `Divergence and verdict by turn. ${summary.join("; ")}` },
    bars && [el("line", { class: "grid", x1: left, x2: width, y1: 10, y2: 10 }),
      label(left - 10, 14, `${digits(top)} nats`), label(left - 10, tall - 12, "divergence")],
    el("line", { class: "base", x1: left, x2: width, y1: tall, y2: tall }),
    marked.map((name, line) => label(left - 10, tall + 18 + 20 * line, names[name])),
    label(left - 10, low + 10, "turn"),
    Array.from({ length: count }, (_, k) => column(k))));
}

// --- What is known of a token

const card = byId("card");
let current = -1; // the token that has the focus
let currentTurn = 0;

const quoted = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "(empty)";

function topFive(top) {
  const bar = (share, who) => {
    const made = el("td", { class: `share ${who}` }, isNumber(share) ? `${(100 * share).toFixed(1)} %` : NOT_FINITE);
    made.style.setProperty("--share", isNumber(share) ? share : 0);
    return made;
  };
  return el("table", {},
    el("thead", {}, el("tr", {}, ["teacher’s top five", "teacher", "student"].map((word) => el("th", { scope: "col" }, word)))),
    el("tbody", {}, top.map(([word, teacher, student]) => el("tr", {},
      el("th", { scope: "row" }, quoted(word)), bar(teacher, "teacher"), bar(student, "student")))));
}

function showCard(i) {
  const span = spans[i], at = (column) => tokens[column]?.[i];
  const [student, sampled, agrees] = [at("student_logprob"), at("sampled_logprob"), at("agrees")];
  const number = (value) => value === null ? NOT_FINITE : has(value) && digits(value);
  const facts = [
    ["divergence", number(at("divergence"))], ["weight", number(at("weight"))],
    ["log p, student", number(student)], ["log p, teacher", number(at("teacher_logprob"))],
    ["log-ratio", number(COLOURS.log_ratio.of(i))], ["first choices", has(agrees) && (agrees ? "agree" : "differ")],
    // As sampled it is another one only where parameters or arithmetic were others.
    ["log p, sampled", has(sampled) && !(Math.abs(sampled - student) < 0.01) && digits(sampled)],
  ].filter(([, value]) => value);
  card.replaceChildren(
    el("p", { class: "token" }, quoted(tokens.text[i]), el("span", {}, `turn ${turnOf[i]}`)),
    el("dl", {}, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    ...(at("top") ? [topFive(at("top"))] : []),
  );
  document.querySelector(".shown")?.classList.remove("shown");
  span.classList.add("shown");
  card.hidden = false;
  // Below the token, or above it where there is no room; a narrow screen has it at the bottom (CSS).
  const box = span.getClientRects()[0] || span.getBoundingClientRect();
  const below = box.bottom + 8 + card.offsetHeight < innerHeight;
  card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8))}px`;
  card.style.top = `${Math.max(8, below ? box.bottom + 8 : box.top - 8 - card.offsetHeight)}px`;
}

function hideCard() {
  card.hidden = true;
  current = -1;
  document.querySelector(".shown")?.classList.remove("shown");
}

const tokenAt = (event) => event.target.dataset?.token;

byId("turns").addEventListener("mouseover", (event) => {
  if (tokenAt(event)) showCard(Number(tokenAt(event)));
  else if (current < 0) hideCard();
  else showCard(current);
});
byId("turns").addEventListener("mouseleave", () => { if (current < 0) hideCard(); });
byId("turns").addEventListener("focusin", (event) => {
  const turn = event.target.closest(".turn");
  if (turn) currentTurn = cards.indexOf(turn);
  if (tokenAt(event)) { current = Number(tokenAt(event)); showCard(current); }
});
document.addEventListener("click", (event) => {
  if (tokenAt(event)) spans[tokenAt(event)].focus({ preventScroll: true });
  else if (!card.contains(event.target)) hideCard();
});
addEventListener("resize", () => { hideCard(); drawChart(); });
addEventListener("scroll", () => { if (current >= 0) showCard(current); else hideCard(); }, { passive: true });

// --- Keyboard

/** The turn that was gone to, or the first one in view after the page was scrolled away from it. */
function turnInView() {
  const inView = (card) => { const box = card.getBoundingClientRect(); return box.bottom > 80 && box.top < innerHeight; };
  if (cards[currentTurn] && inView(cards[currentTurn])) return currentTurn;
  return Math.max(0, cards.findIndex(inView));
}

function goToTurn(k) {
  drawUntil(() => cards[k]);
  if (!cards[k]) return;
  hideCard();
  currentTurn = k;
  cards[k].focus({ preventScroll: true });
  cards[k].scrollIntoView({ block: "start" });
}

function goToToken(step) {
  const start = firstToken.get(turnInView());
  const i = current >= 0 ? current + step : start ?? 0;
  drawUntil(() => spans[i]);
  if (!spans[i]) return;
  spans[i].focus({ preventScroll: true });
  spans[i].scrollIntoView({ block: "nearest" });
  showCard(i);
}

const keys = {
  n: () => choose(neighbour(1)),
  p: () => choose(neighbour(-1)),
  j: () => goToTurn(cards.includes(document.activeElement?.closest?.(".turn")) ? turnInView() + 1 : turnInView()),
  k: () => goToTurn(Math.max(0, turnInView() - 1)),
  ArrowRight: () => goToToken(1),
  ArrowLeft: () => goToToken(-1),
  c: () => { const names = available(); if (names.length) setColour(names[(names.indexOf(colour) + 1) % names.length]); },
  "/": () => { showList(true); filters.elements.text.focus(); },
  Escape: () => { hideCard(); showList(false); document.activeElement?.blur(); },
};
addEventListener("keydown", (event) => {
  const writes = event.target.matches?.("input[type=search], select"), picks = event.target.matches?.("input[type=radio]");
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  if ((writes && event.key !== "Escape") || (picks && event.key.startsWith("Arrow"))) return;
  event.preventDefault();
  keys[event.key]();
});

// --- Start

byId("open").addEventListener("click", () => showList(!document.body.classList.contains("list-open")));
byId("close").addEventListener("click", () => showList(false));
byId("previous").addEventListener("click", keys.p);
byId("next").addEventListener("click", keys.n);
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("input", applyFilters);
byId("left-out").textContent = index.left_out;
byId("left-out").hidden = !index.left_out;
index.episodes.forEach((entry, k) => rows.push(row(entry, k)));
list.append(...rows);
fillFilters();
applyFilters();
document.documentElement.setAttribute("data-ready", Math.round(performance.now()));
