"use strict";
// The picture of a run: blocks, requests over time, queue and counters. replay.html and live.html
// share it. A run is a header and one line a step, as watch/recorder.py writes them; `Run` turns
// lines into what is drawn, `View` draws one step of it. Text from a run is only ever set as text,
// never as HTML. Nothing here asks a network for anything.

// The colours and letters of plots/palette.py: a request looks the same in all pictures.
const PALETTE = [
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
  "#332288", "#999933", "#882255", "#44aa99", "#aa4499",
];
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const MOST_BLOCKS = 65536; // of a pool that is drawn
const LEAST_BLOCKS = 256; // that are drawn, if the pool has as many
const MOST_LANES = 100; // rows of requests that are drawn at once
const MOST_STEPS = 600; // columns that are drawn at once

const numberOf = (request) => Number.parseInt(request, 10) || 0;
const colourOf = (request) => PALETTE[numberOf(request) % PALETTE.length];
const letterOf = (request) => LETTERS[numberOf(request) % LETTERS.length];
const keyOf = (request, index) => `${request}/${index}`;
const byRequest = (a, b) => numberOf(a.request) - numberOf(b.request) || a.index - b.index;
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

/** "#000" or "#fff", whichever is easier to read on a colour "#rrggbb" (WCAG 2.2). */
function textOn(colour) {
  const [r, g, b] = [1, 3, 5].map((i) => {
    const x = Number.parseInt(colour.slice(i, i + 2), 16) / 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/** A new element: `element("p", {class: "faint"}, "words", child)`. Words become text nodes. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A request's letter in its colour; `index` is added where the request has several texts. */
function chip(request, index = "") {
  const node = element("span", { class: "chip" }, letterOf(request), element("sub", {}, index));
  node.style.background = colourOf(request);
  node.style.color = textOn(colourOf(request));
  return node;
}

// ---- reading a recording ---------------------------------------------------------------------------
const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
const COUNTS = ["num_waiting", "num_free", "blocks_taken", "blocks_freed", "blocks_copied"];
COUNTS.push("blocks_hit", "blocks_evicted", "blocks_swapped");
const LISTS = ["sequences", "added", "aborted", "preempted"];
const PHASES = ["prefill", "decode", null];

/** Raises an Error with the reason unless this is the header of a recording. */
function checkHeader(header) {
  if (header?.format !== "PagedGPT recording") throw new Error("this is no recording of PagedGPT");
  if (header.version !== 1) throw new Error(`version ${header.version}: this page knows version 1`);
  const { num_blocks, block_size } = header;
  if (!isCount(num_blocks) || !isCount(block_size) || !num_blocks || !block_size) {
    throw new Error("num_blocks and block_size must be integers of at least 1");
  }
  if (num_blocks > MOST_BLOCKS) {
    throw new Error(`the pool has ${num_blocks} blocks, this page draws at most ${MOST_BLOCKS}`);
  }
}

/** Raises an Error with the reason unless a line has the fields that are drawn. */
function checkLine(line, header) {
  for (const name of COUNTS) if (!isCount(line?.[name])) throw new Error(`${name} is no count`);
  for (const name of LISTS) if (!Array.isArray(line[name])) throw new Error(`${name} is no list`);
  if (!(line.milliseconds >= 0)) throw new Error("milliseconds is no time");
  const inPool = (id) => isCount(id) && id < header.num_blocks;
  if (!(line.cached ?? []).every(inPool)) throw new Error("cached names an unknown block");
  for (const sequence of line.sequences) {
    const { block_table, phase, new_tokens, num_computed_tokens } = sequence;
    const isWhole = isCount(new_tokens) && isCount(num_computed_tokens) && PHASES.includes(phase);
    if (!isWhole || !Array.isArray(block_table) || !block_table.every(inPool)) {
      throw new Error(`sequence ${sequence.request} has no valid phase, counts or block table`);
    }
  }
}

/** The run of a recording's text. A last line without its end is left out. */
function readRecording(text) {
  const lines = text.split("\n").slice(0, -1);
  let run = null;
  lines.forEach((line, i) => {
    try {
      const record = JSON.parse(line);
      if (run === null) run = new Run(record);
      else run.add(record);
    } catch (error) {
      throw new Error(`line ${i + 1}: ${error.message}`);
    }
  });
  if (!run?.lines.length) throw new Error("the file holds no whole step of a run");
  return run;
}

// ---- what the lines say ----------------------------------------------------------------------------
/** A run: its lines, the life of each sequence, and the texts of the tokens. */
class Run {
  constructor(header, keep = Infinity) {
    checkHeader(header);
    this.header = header;
    this.keep = keep; // lines; a live page forgets older ones
    this.lines = [];
    this.first = 0; // number of lines[0], counted from 0
    this.lanes = new Map(); // by key, in order of arrival: see `lane`
    this.texts = new Map(); // by key: the texts of the sequence's tokens
    this.totals = { milliseconds: 0, computed: 0, preempted: 0, copied: 0, hit: 0, evicted: 0 };
    this.hasGap = false; // lines were lost before the next one
    this.lastHolder = []; // by block: the entry of the sequence that held it last
    this.heldAt = []; // by block: the number of the last line in which it was held
  }

  get end() {
    return this.first + this.lines.length;
  }

  /** How many blocks are drawn: of a large pool those up to the last that was ever held. */
  get numShown() {
    let count = LEAST_BLOCKS;
    while (count < this.lastHolder.length) count *= 2;
    return Math.min(count, this.header.num_blocks);
  }

  line(number) {
    return this.lines[number - this.first];
  }

  /** Take the line of the next step. */
  add(line) {
    checkLine(line, this.header);
    const number = this.end;
    this.noteLives(line, number);
    this.noteTexts(line);
    this.hasGap = false;
    this.count(line);
    this.noteCached(line, number);
    this.lines.push(line);
    if (this.lines.length > this.keep) this.forget();
  }

  /** Enter the state of each sequence in this step. */
  noteLives(line, number) {
    const states = new Map();
    for (const [request, index] of line.preempted) states.set(keyOf(request, index), "preempted");
    for (const { request, index, phase } of line.sequences) {
      this.lane(request, index, number).end = null; // it may have been taken for lost
      // Between two of its tokens a running sequence may have to wait for the step's budget.
      states.set(keyOf(request, index), phase ?? "idle");
    }
    for (const [request, n] of line.added) {
      for (let index = 0; index < n; index++) this.lane(request, index, number);
    }
    for (const [key, lane] of this.lanes) {
      if (lane.end !== null) continue;
      const isLost = this.hasGap && !states.has(key);
      if (isLost || line.aborted.includes(lane.request)) lane.end = number;
      else this.extend(lane, states.get(key) ?? "waiting", number);
    }
    for (const { request, index, finish_reason } of line.sequences) {
      if (finish_reason !== null) this.lane(request, index, number).end = number + 1;
    }
  }

  /** Enter the texts of new tokens. */
  noteTexts(line) {
    for (const [request, index, first, texts] of line.tokens ?? []) {
      const key = keyOf(request, index);
      if (!this.texts.has(key)) this.texts.set(key, []);
      texts.forEach((text, i) => (this.texts.get(key)[first + i] = text));
    }
  }

  /** The life of a sequence: its runs of equal states, [state, first step, end]. */
  lane(request, index, number) {
    const key = keyOf(request, index);
    if (!this.lanes.has(key)) {
      this.lanes.set(key, { key, request, index, start: number, end: null, runs: [] });
    }
    return this.lanes.get(key);
  }

  extend(lane, state, number) {
    const last = lane.runs.at(-1);
    if (last && last[0] === state && state !== "preempted" && last[2] === number) last[2]++;
    else lane.runs.push([state, number, number + 1]);
  }

  /** Add a line to the totals, and keep a copy of them with it: the slider goes back, too. */
  count(line) {
    const totals = { ...this.totals };
    totals.milliseconds += line.milliseconds;
    totals.preempted += line.preempted.length;
    totals.copied += line.blocks_copied;
    totals.hit += line.blocks_hit;
    totals.evicted += line.blocks_evicted;
    for (const { new_tokens } of line.sequences) totals.computed += new_tokens;
    this.totals = line.totals = totals;
  }

  /** Set `line.owners`: the blocks that are cached and have no holder, and whose they were. */
  noteCached(line, number) {
    const before = this.lines.at(-1)?.owners ?? new Map();
    let isSame = line.cached === undefined;
    for (const sequence of line.sequences) {
      for (const block of sequence.block_table) {
        this.lastHolder[block] = sequence;
        this.heldAt[block] = number;
        if (before.has(block)) isSame = false;
      }
    }
    line.owners = isSame ? before : new Map();
    if (isSame) return;
    // A line without a list: those that were cached and are not held now.
    for (const block of line.cached ?? before.keys()) {
      if (this.heldAt[block] === number) continue;
      line.owners.set(block, before.get(block) ?? this.ownerOf(block));
    }
  }

  /** Who held a block last, as `holders` has it; null if that is not known. */
  ownerOf(block) {
    const sequence = this.lastHolder[block];
    if (!sequence) return null;
    const { request, index, block_table, num_computed_tokens } = sequence;
    const logical = block_table.indexOf(block);
    return { request, index, logical, computed: num_computed_tokens };
  }

  /** For each block of the pool the sequences that have it in their tables, in one step. */
  holders(line) {
    const held = Array.from({ length: this.header.num_blocks }, () => []);
    for (const { request, index, block_table, num_computed_tokens } of line.sequences) {
      block_table.forEach((block, logical) => {
        held[block].push({ request, index, logical, computed: num_computed_tokens });
      });
    }
    return held;
  }

  /** How many slots of a holder's block are filled: 13 tokens, block_size 8 -> 8 and 5. */
  filled({ logical, computed }) {
    const { block_size } = this.header;
    return Math.min(Math.max(computed - logical * block_size, 0), block_size);
  }

  /** The state of a sequence in a step, null before its arrival and after its end. */
  stateAt(lane, number) {
    const found = lane.runs.findLast(([, first]) => first <= number);
    return found && number < found[2] ? found[0] : null;
  }

  /** Drop the oldest line, and the sequences that ended before it. */
  forget() {
    this.lines.shift();
    this.first++;
    for (const [key, lane] of this.lanes) {
      if (lane.end !== null && lane.end < this.first) {
        this.lanes.delete(key);
        this.texts.delete(key);
      }
    }
  }
}

// ---- the trace for chrome://tracing and ui.perfetto.dev --------------------------------------------
/** A run in Chrome's trace format: a row for each sequence, and counters for the pool. */
function chromeTrace(run) {
  const starts = []; // microseconds at which each step begins
  let now = 0;
  for (const line of run.lines) {
    starts.push(now);
    now += line.milliseconds * 1000;
  }
  starts.push(now);
  const at = (number) => starts[Math.max(0, number - run.first)];
  const name = (pid, text) => ({ ph: "M", name: "process_name", pid, args: { name: text } });
  const events = [name(1, "requests"), name(2, "pool")];
  [...run.lanes.values()].forEach((lane, i) => {
    const where = { pid: 1, tid: i + 1 };
    const title = `${letterOf(lane.request)} (request ${lane.request}, text ${lane.index})`;
    events.push({ ph: "M", name: "thread_name", ...where, args: { name: title } });
    for (const [state, first, end] of lane.runs) {
      if (end <= run.first) continue;
      const args = { first_step: first + 1, last_step: end };
      const ts = at(first);
      events.push({ ph: "X", name: state, cat: "request", ts, dur: at(end) - ts, ...where, args });
    }
  });
  run.lines.forEach((line, i) => {
    const { held, cached, free } = countBlocks(run, line);
    const where = { pid: 2, tid: 1, ts: starts[i] };
    events.push({ ph: "C", name: "blocks", ...where, args: { held, cached, free } });
    const running = line.sequences.filter((sequence) => sequence.phase).length;
    events.push({ ph: "C", name: "sequences", ...where, args: { running, waiting: line.num_waiting } });
  });
  return { displayTimeUnit: "ms", traceEvents: events };
}

/** Save a value as a file of JSON. */
function download(value, name) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value)], { type: "application/json" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** How many blocks are held, shared, cached (kept without a holder) and free after a step. */
function countBlocks(run, line, holders = run.holders(line)) {
  const held = holders.filter((each) => each.length).length;
  const shared = holders.filter((each) => each.length > 1).length;
  const cached = line.owners.size;
  return { held, shared, cached, free: run.header.num_blocks - held - cached };
}

// ---- drawing ---------------------------------------------------------------------------------------
/** Make a canvas `height` pixels high and as wide as its parent; its context, cleared. */
function prepare(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return context;
}

/** The colours of the page, light or dark, as view.css has them. */
function themeColours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["card", "ink", "faint", "empty", "light", "edge"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Diagonal lines over a rectangle. */
function hatch(context, x, y, width, height, colour) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.strokeStyle = colour;
  context.lineWidth = 1.5;
  context.beginPath();
  const gap = Math.max(4, width / 5);
  for (let i = -height; i < width; i += gap) {
    context.moveTo(x + i, y + height);
    context.lineTo(x + i + height, y);
  }
  context.stroke();
  context.restore();
}

/** The largest cells, at most 46 pixels wide, with which `n` blocks fit into a width and height. */
function gridShape(n, width, height) {
  for (let size = 46; size > 5; size--) {
    const columns = Math.floor(width / size);
    if (columns && Math.ceil(n / columns) * size <= height) return { size, columns };
  }
  return { size: 5, columns: Math.max(1, Math.floor(width / 5)) };
}

/** Draws one step of a run into `root`. `onSeek(number)` is called for a click on a column. */
class View {
  constructor(root, onSeek) {
    this.onSeek = onSeek;
    this.run = null;
    this.number = 0; // of the step, counted from 0
    this.selected = null; // a block
    this.isScheduled = false;
    this.build(root);
    new ResizeObserver(() => this.schedule()).observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.schedule());
  }

  /** Make the elements. */
  build(root) {
    this.counters = element("dl", { class: "counters" });
    this.grid = element("canvas", {
      id: "grid", tabindex: "0", role: "img",
      onclick: (event) => this.select(this.blockAt(event)),
      onkeydown: (event) => this.moveSelection(event),
    });
    this.rest = element("p", { class: "faint" });
    this.detail = element("section", { id: "detail", class: "card", "aria-label": "chosen block" });
    this.spoken = element("p", { class: "spoken", "aria-live": "polite" });
    this.lanes = element("canvas", {
      id: "lanes", role: "img", onclick: (event) => this.seek(event),
    });
    this.queue = element("p", { id: "queue" });
    const legend = ["full", "partly filled", "shared", "cached", "new", "free"];
    const states = ["prefill", "decode", "waiting", "preempted"];
    const key = (name) => element("li", { class: name.replace(" ", "-") }, name);
    root.append(
      element("section", { class: "card", "aria-label": "the pool" },
        this.counters, element("h2", {}, "Blocks"), this.grid, this.rest,
        element("ul", { class: "legend" }, ...legend.map(key))),
      this.detail,
      element("section", { class: "card wide", "aria-label": "the requests" },
        element("h2", {}, "Requests"), this.queue, element("div", { class: "scroll" }, this.lanes),
        element("ul", { class: "legend" }, ...states.map(key))),
      this.spoken,
    );
  }

  /** Show a step of a run, with the next frame of the screen. */
  show(run, number) {
    this.run = run;
    this.number = number;
    if (this.selected >= run.header.num_blocks) this.selected = null;
    this.schedule();
  }

  schedule() {
    if (this.isScheduled) return;
    this.isScheduled = true;
    requestAnimationFrame(() => {
      this.isScheduled = false;
      this.draw();
    });
  }

  draw() {
    const line = this.run?.line(this.number);
    if (!line) return;
    this.theme = themeColours();
    this.line = line;
    this.holders = this.run.holders(line);
    this.drawCounters();
    this.drawGrid();
    this.drawDetail();
    this.drawQueue();
    this.drawLanes();
  }

  // ---- counters and queue ----
  drawCounters() {
    const { run, line } = this;
    const { held, shared, cached, free } = countBlocks(run, line, this.holders);
    const filled = this.holders.map((each) => Math.max(0, ...each.map((one) => run.filled(one))));
    const tokens = filled.reduce((sum, n) => sum + n, 0);
    const share = held ? `${((100 * tokens) / (held * run.header.block_size)).toFixed(0)}%` : "-";
    const running = new Set(line.sequences.filter((s) => s.block_table.length)).size;
    const figures = {
      running, waiting: line.num_waiting,
      "blocks held": held, shared, cached, free,
      "filled": share,
      "tokens this step": line.sequences.reduce((sum, s) => sum + s.new_tokens, 0),
      "tokens computed": line.totals.computed,
      preemptions: line.totals.preempted,
      "copied blocks": line.totals.copied,
      "cached blocks found": line.totals.hit,
      "ms this step": line.milliseconds.toFixed(1),
    };
    this.counters.replaceChildren(
      ...Object.entries(figures).map(([name, value]) =>
        element("div", {}, element("dt", {}, name),
          element("dd", { "data-name": name }, value.toLocaleString("en")))),
    );
  }

  drawQueue() {
    const waiting = [];
    for (const lane of this.run.lanes.values()) {
      const state = this.run.stateAt(lane, this.number);
      if (state === "waiting" || state === "preempted") waiting.push(lane);
    }
    // First come, first served: a preempted request is older than those that never ran.
    waiting.sort(byRequest);
    const shown = waiting.slice(0, 24).map((lane) => chip(lane.request, this.indexLabel(lane)));
    const more = this.line.num_waiting - shown.length;
    if (more > 0) shown.push(` and ${more.toLocaleString("en")} more`);
    this.queue.replaceChildren("queue: ", ...(shown.length ? shown : ["empty"]));
  }

  /** A text's index, if its request has several texts. */
  indexLabel({ request, index }) {
    return index > 0 || this.run.lanes.has(keyOf(request, 1)) ? `${index}` : "";
  }

  // ---- the grid of blocks ----
  drawGrid() {
    const num_blocks = this.run.numShown;
    const rest = this.run.header.num_blocks - num_blocks;
    this.rest.textContent = rest ? `and ${plural(rest, "block")} that nobody has held yet` : "";
    const width = this.grid.parentElement.clientWidth - 2 * padding(this.grid.parentElement);
    this.shape = gridShape(num_blocks, width, Math.max(240, window.innerHeight * 0.42));
    const { size, columns } = this.shape;
    const context = prepare(this.grid, width, Math.ceil(num_blocks / columns) * size);
    const before = this.run.line(this.number - 1);
    const heldBefore = before && this.run.holders(before);
    for (let block = 0; block < num_blocks; block++) {
      const isNew = heldBefore && this.holders[block].length && !heldBefore[block].length;
      this.drawBlock(context, block, isNew);
    }
    const { held, shared, cached, free } = countBlocks(this.run, this.line, this.holders);
    const counts = `${held} blocks held, ${shared} shared, ${cached} cached, ${free} free`;
    this.grid.setAttribute("aria-label", `${counts}. Arrow keys choose a block.`);
  }

  /** One block: its filled slots in its request's colour, hatched if it is shared. */
  drawBlock(context, block, isNew) {
    const { size, columns } = this.shape;
    const gap = size > 12 ? 2 : size > 7 ? 1 : 0.5;
    const x = (block % columns) * size + gap / 2;
    const y = Math.floor(block / columns) * size + gap / 2;
    const side = size - gap;
    const holders = this.holders[block];
    const owner = holders[0] ?? this.line.owners.get(block);
    const isHeld = holders.length > 0;
    const share = isHeld ? this.run.filled(owner) / this.run.header.block_size : 0;
    this.box(context, x, y, side, this.theme.empty, 1);
    if (isHeld) {
      this.box(context, x, y, side, colourOf(owner.request), 0.3);
      context.fillRect(x, y, side * share, side);
    } else if (this.line.owners.has(block)) {
      const colour = owner ? colourOf(owner.request) : this.theme.faint;
      this.box(context, x, y, side, colour, 0.25);
      context.strokeStyle = colour;
      context.lineWidth = 1;
      context.setLineDash([3, 3]);
      context.strokeRect(x + 0.5, y + 0.5, side - 1, side - 1);
      context.setLineDash([]);
    }
    if (holders.length > 1) {
      const other = holders.find((each) => each.request !== owner.request);
      hatch(context, x, y, side, side, other ? colourOf(other.request) : this.theme.card);
    }
    const inkAt = (place) => (share >= place ? textOn(colourOf(owner.request)) : this.theme.ink);
    if (owner && size >= 18) {
      const count = holders.length > 1 && size >= 30 ? `\u00d7${holders.length}` : "";
      context.font = `600 ${Math.min(15, side * 0.5)}px system-ui, sans-serif`;
      const label = letterOf(owner.request) + count;
      const isMixed = holders.length > 1 || (share > 0.3 && share < 0.7);
      if (isMixed) this.outline(context, label, x + side / 2, y + side / 2);
      else this.write(context, label, x + side / 2, y + side / 2, "center", inkAt(0.6));
    }
    if (size >= 32) {
      context.font = "9px system-ui, sans-serif";
      this.write(context, `${block}`, x + side - 3, y + side - 7, "right", inkAt(1));
    }
    if (isNew || block === this.selected) {
      context.strokeStyle = this.theme.ink;
      context.lineWidth = block === this.selected ? 3 : 1.5;
      const inset = context.lineWidth / 2;
      context.strokeRect(x + inset, y + inset, side - 2 * inset, side - 2 * inset);
    }
  }

  /** A filled square; afterwards the context fills with the same colour, opaque. */
  box(context, x, y, side, colour, opacity) {
    context.fillStyle = colour;
    context.globalAlpha = opacity;
    context.fillRect(x, y, side, side);
    context.globalAlpha = 1;
  }

  /** A line of text; `y` is its middle. */
  write(context, text, x, y, align, colour) {
    context.textAlign = align;
    context.textBaseline = "middle";
    context.fillStyle = colour;
    context.fillText(text, x, y);
  }

  /** Text with an outline, which can be read on two colours. */
  outline(context, text, x, y) {
    context.lineJoin = "round";
    context.lineWidth = 4;
    context.strokeStyle = this.theme.card;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.strokeText(text, x, y);
    this.write(context, text, x, y, "center", this.theme.ink);
  }

  blockAtPoint(x, y) {
    const { size, columns } = this.shape;
    const column = Math.floor(x / size);
    const block = Math.floor(y / size) * columns + column;
    return column < columns && block < this.run.numShown ? block : null;
  }

  blockAt(event) {
    return this.run && this.blockAtPoint(event.offsetX, event.offsetY);
  }

  /** Choose the block whose tokens and holders are shown; null: none. */
  select(block) {
    this.selected = block === this.selected ? null : block;
    this.draw();
    this.spoken.textContent = this.detail.firstChild?.textContent ?? "";
  }

  moveSelection(event) {
    if (!this.shape) return;
    if (event.key === "Escape" && this.selected !== null) this.select(null);
    const { columns } = this.shape;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (!(event.key in moves)) return;
    event.preventDefault(); // no scrolling
    event.stopPropagation(); // the page's own arrow keys change the step
    const wanted = this.selected === null ? 0 : this.selected + moves[event.key];
    if (wanted >= 0 && wanted < this.run.numShown) this.select(wanted);
  }

  // ---- one block ----
  drawDetail() {
    const { block_size } = this.run.header;
    const block = this.selected;
    if (block === null) {
      const hint = "Click a block, or choose one with the arrow keys, to see its tokens and holders.";
      this.detail.replaceChildren(element("p", { class: "faint" }, hint));
      return;
    }
    const holders = this.holders[block];
    const slots = `slots ${block * block_size} to ${(block + 1) * block_size - 1}`;
    const cachedOwner = this.line.owners.get(block);
    let state = "free";
    if (holders.length) state = `held by ${plural(holders.length, "sequence")}`;
    else if (this.line.owners.has(block)) state = "cached: kept, without a holder";
    const copy = this.line.copies?.find(([, to]) => to === block);
    const from = copy ? `, copied from block ${copy[0]} in this step` : "";
    this.detail.replaceChildren(
      element("h2", {}, `Block ${block}: ${state}`),
      element("p", { class: "faint" }, `${slots}, reference count ${holders.length}${from}`),
      ...(holders[0] ?? cachedOwner ? [this.tokenList(holders[0] ?? cachedOwner)] : []),
      ...holders.slice(0, 12).map((each) => this.holderOf(each)),
    );
  }

  /** The tokens of a block, slot by slot; a slot without a token is empty. */
  tokenList(owner) {
    const { block_size } = this.run.header;
    const texts = this.run.texts.get(keyOf(owner.request, owner.index)) ?? [];
    const first = owner.logical * block_size;
    const items = Array.from({ length: block_size }, (_, i) => {
      if (i >= this.run.filled(owner)) return element("li", { class: "no-token" }, "\u00a0");
      const text = texts[first + i] ?? "?";
      // A space and the end of a line are made visible.
      return element("li", {}, text.replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5"));
    });
    return element("ol", { class: "tokens" }, ...items);
  }

  /** A holder: which tokens of it the block has, and its block table as buttons. */
  holderOf(holder) {
    const { request, index, logical, computed } = holder;
    const { block_size } = this.run.header;
    const end = Math.min((logical + 1) * block_size, Math.max(computed, logical * block_size));
    const words = ` logical block ${logical}: tokens [${logical * block_size}, ${end})`;
    const { block_table } = this.line.sequences.find(
      (each) => each.request === request && each.index === index,
    );
    const table = block_table.slice(0, 200).map((block) =>
      element("button", {
        type: "button", "aria-pressed": `${block === this.selected}`,
        onclick: () => block !== this.selected && this.select(block),
      }, `${block}`));
    return element("div", { class: "holder" },
      element("p", {}, chip(request, this.indexLabel(holder)), words),
      element("p", { class: "table" }, "block_table ", ...table),
      element("p", { class: "text" }, this.textOf(holder)));
  }

  /** The end of what a sequence's computed tokens say. */
  textOf({ request, index, computed }) {
    const texts = this.run.texts.get(keyOf(request, index)) ?? [];
    const text = texts.slice(0, computed).join("");
    return text.length > 400 ? `\u2026${text.slice(-400)}` : text;
  }

  // ---- the requests over time ----
  /** The steps that are drawn: all, or those around the step that is shown. */
  window() {
    const { first, end } = this.run;
    if (end - first <= MOST_STEPS) return [first, Math.max(end, first + 40)];
    const from = Math.min(Math.max(this.number - MOST_STEPS / 2, first), end - MOST_STEPS);
    return [from, from + MOST_STEPS];
  }

  drawLanes() {
    const [from, to] = this.window();
    const isIn = ({ start, end }) => start < to && (end === null || end > from);
    const lanes = [...this.run.lanes.values()].filter(isIn).sort(byRequest);
    const shown = lanes.slice(-MOST_LANES);
    const width = this.lanes.parentElement.clientWidth;
    const top = 46;
    const row = 18;
    const left = 44;
    const context = prepare(this.lanes, width, top + shown.length * row + 4);
    const plot = { from, to, left, width: width - left - 8, x: null };
    plot.x = (number) => left + ((number - from) / (to - from)) * plot.width;
    this.plot = plot;
    this.drawPoolOverTime(context, plot, top - 10);
    shown.forEach((lane, i) => this.drawLane(context, plot, lane, top + i * row, row));
    context.fillStyle = this.theme.card; // what comes after the step that is shown is faint
    context.globalAlpha = 0.6;
    context.fillRect(plot.x(this.number + 1), 0, width, top + shown.length * row);
    context.globalAlpha = 1;
    context.fillStyle = this.theme.ink;
    context.fillRect(plot.x(this.number + 1) - 1, 0, 2, top + shown.length * row);
    const label = `${plural(lanes.length, "sequence")} over ${plural(this.run.end, "step")}`;
    this.lanes.setAttribute("aria-label", label);
  }

  /** The share of the pool that is held, and above it what is cached, for each step. */
  drawPoolOverTime(context, plot, height) {
    const { num_blocks } = this.run.header;
    context.font = "11px system-ui, sans-serif";
    this.write(context, "pool", 2, height / 2, "left", this.theme.ink);
    context.fillStyle = this.theme.empty;
    context.fillRect(plot.left, 0, plot.width, height);
    for (let number = plot.from; number < Math.min(plot.to, this.run.end); number++) {
      const line = this.run.line(number);
      const used = num_blocks - line.num_free;
      const cached = line.owners.size;
      const x = Math.round(plot.x(number));
      const width = Math.round(plot.x(number + 1)) - x;
      context.fillStyle = this.theme.faint;
      context.fillRect(x, height * (1 - used / num_blocks), width, height * (used / num_blocks));
      context.fillStyle = this.theme.light;
      const share = cached / num_blocks;
      context.fillRect(x, height * (1 - used / num_blocks - share), width, height * share);
    }
  }

  drawLane(context, plot, lane, top, row) {
    const colour = colourOf(lane.request);
    const middle = top + row / 2;
    context.fillStyle = colour;
    context.fillRect(4, top + 2, 15, row - 4);
    context.font = "600 11px system-ui, sans-serif";
    this.write(context, letterOf(lane.request), 11.5, middle + 0.5, "center", textOn(colour));
    this.write(context, this.indexLabel(lane), 23, middle + 0.5, "left", this.theme.ink);
    // [colour, height of the bar] of each state; a wait is a thin grey line.
    const bars = { prefill: [colour, 12], decode: [colour, 6], idle: [colour, 2] };
    for (const [state, first, end] of lane.runs) {
      if (end <= plot.from || first >= plot.to) continue;
      const x = plot.x(Math.max(first, plot.from));
      const width = plot.x(Math.min(end, plot.to)) - x;
      const [fill, height] = bars[state] ?? [this.theme.light, 2];
      context.fillStyle = fill;
      context.fillRect(x, middle - height / 2, width, height);
      context.strokeStyle = this.theme.edge; // the darkest colours need one on a dark page
      context.lineWidth = 1;
      if (height > 2) context.strokeRect(x, middle - height / 2, width, height);
      if (state === "preempted") this.drawCross(context, x + width / 2, middle);
    }
  }

  drawCross(context, x, y) {
    context.strokeStyle = this.theme.ink;
    context.lineWidth = 1.6;
    context.beginPath();
    for (const [dx, dy] of [[4, 4], [4, -4]]) {
      context.moveTo(x - dx, y - dy);
      context.lineTo(x + dx, y + dy);
    }
    context.stroke();
  }

  seek(event) {
    if (!this.plot) return;
    const { from, to, left, width } = this.plot;
    const number = from + Math.floor(((event.offsetX - left) / width) * (to - from));
    this.onSeek(Math.min(Math.max(number, this.run.first), this.run.end - 1));
  }
}

/** The padding of an element, in pixels. */
function padding(node) {
  return Number.parseFloat(getComputedStyle(node).paddingLeft);
}
