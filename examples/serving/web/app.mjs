/** The page: two texts of one model that grow in turns, one of them at the slider's strength. */

import { CausalLM, ModelError } from './common/causal_lm.mjs';
import { loadText, roomFor, Transcript } from './common/text.mjs';
import * as ort from './ort/ort.wasm.min.mjs';
import { Tokenizer } from './tokenizers/tokenizers.min.mjs';

const MODEL = './model/model.onnx';
const MISSING_DATA = /external data file "+([\w.-]+)"/;

const byId = (id) => document.getElementById(id);

/** A text on the page, and the continuation that makes it grow. */
class Panel {
  #element;
  #tokens = null;
  #transcript;

  constructor(element) {
    this.#element = element;
  }

  /** Whether there is more to come. */
  get busy() {
    return this.#tokens !== null;
  }

  /** Forget the text and begin one with these tokens. */
  start(transcript, tokens) {
    this.#transcript = transcript;
    this.#tokens = tokens;
    this.#element.textContent = transcript.settled;
  }

  /** Add one token, unless the text was begun anew while the model computed. */
  async step() {
    const tokens = this.#tokens;
    const { done, value } = await tokens.next();
    if (tokens !== this.#tokens) return;
    if (!done) this.#transcript.push(value);
    this.#element.textContent = done ? this.#transcript.text : this.#transcript.settled;
    if (done) this.#tokens = null;
  }
}

const base = new Panel(byId('base'));
const steered = new Panel(byId('steered'));
let loaded;
let running = false;
/** What was asked for last; the slider writes from it, so that both texts share their prompt. */
let request = null;

function show(state, message) {
  document.body.dataset.state = state;
  byId('status').textContent = message;
}

function fail(error) {
  show('error', error.message);
  // Anything else is a fault in this page, and its trace is wanted.
  if (!(error instanceof ModelError)) console.error(error);
}

async function readJson(name) {
  const response = await fetch(`./model/${name}`);
  if (response.status === 404) return null;
  if (!response.ok) throw new ModelError(`${name}: the server answered ${response.status}`);
  return response.json();
}

async function loadModel() {
  try {
    return await CausalLM.load(ort, MODEL);
  } catch (error) {
    // Weights in a file of their own must be named; only the model itself knows the name.
    const name = MISSING_DATA.exec(error.message)?.[1];
    if (!name) throw error;
    const externalData = [{ path: name, data: new URL(`./model/${name}`, location).href }];
    return CausalLM.load(ort, MODEL, { externalData });
  }
}

function readRequest() {
  const promptIds = loaded.tokenizer.encode(byId('prompt').value).ids;
  const wanted = byId('tokens').valueAsNumber;
  return { promptIds, maxNewTokens: roomFor(promptIds.length, wanted, loaded.contextLength) };
}

/** Begin the text of a panel at a strength. */
function begin(panel, scale) {
  const { model, tokenizer, stopIds } = loaded;
  const { promptIds, maxNewTokens } = request;
  const tokens = model.generate(promptIds, { maxNewTokens, scale, stopIds });
  panel.start(new Transcript(tokenizer, promptIds), tokens);
}

/** Let the texts grow in turns until both are done: a session runs one step at a time. */
async function grow() {
  show('running', 'Writing …');
  if (running) return;
  running = true;
  try {
    while (base.busy || steered.busy) {
      for (const panel of [base, steered]) if (panel.busy) await panel.step();
    }
    // An error that came meanwhile stays on the page.
    if (document.body.dataset.state === 'running') show('done', note());
  } finally {
    running = false;
  }
}

function note() {
  if (loaded.model.steerable) return 'Move the slider to write the steered text again.';
  return 'This model has no steering_scale input: its strength is fixed, and it has no base text.';
}

function showScale() {
  const label = byId('scale').valueAsNumber.toFixed(1);
  byId('scale-value').textContent = label;
  byId('steered-scale').textContent = `strength ${label}`;
}

function writeSteered() {
  begin(steered, loaded.model.steerable ? byId('scale').valueAsNumber : 1);
  return grow();
}

function writeBoth() {
  request = readRequest();
  if (loaded.model.steerable) begin(base, 0);
  return writeSteered();
}

function moveSlider() {
  showScale();
  return request && writeSteered();
}

/** Run an action of the page; whatever goes wrong is said on the page. */
function guarded(action) {
  return async (event) => {
    event?.preventDefault();
    try {
      await action();
    } catch (error) {
      fail(error);
    }
  };
}

async function main() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL('./ort/', import.meta.url).href;
  // In a worker, so that the page answers while the model computes.
  ort.env.wasm.proxy = true;
  const [model, text] = await Promise.all([loadModel(), loadText(readJson, Tokenizer)]);
  loaded = { model, ...text };
  for (const id of ['strength', 'steered-scale', 'base-panel']) byId(id).hidden = !model.steerable;
  showScale();
  byId('write').disabled = false;
  byId('controls').addEventListener('submit', guarded(writeBoth));
  byId('scale').addEventListener('input', guarded(moveSlider));
  show('ready', note());
}

guarded(main)();
