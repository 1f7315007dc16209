/**
 * Greedy tokens from a causal language model in ONNX, with its KV cache.
 *
 * Inputs  `input_ids`, `attention_mask`[, `position_ids`], `past_key_values.{i}.{key|value}`
 *         [, `steering_scale`]
 * Outputs `logits`, `present.{i}.{key|value}`
 *
 * The runtime comes in as an argument: onnxruntime-node and onnxruntime-web have one API.
 */

const PAST = /^past_key_values\.\d+\.(key|value)$/;
const SCALE = 'steering_scale';
const TOKEN_INPUTS = ['input_ids', 'attention_mask', 'position_ids'];

/** Bad input, said in one line to the person who gave it. */
export class ModelError extends Error {}

/** First line of an error that a runtime threw; their texts run over many. */
export function reason(error) {
  return String(error?.message ?? error).trim().split('\n')[0];
}

/**
 * A loaded model.
 *
 * Several texts may grow at once, in turns: ask for a token only when the last one has come,
 * since a session runs one step at a time.
 */
export class CausalLM {
  #ort;
  #session;
  #past;

  /**
   * Load a model.
   *
   * @param {object} ort the namespace of onnxruntime-node or onnxruntime-web
   * @param {string} source path (node) or URL (web) of the `.onnx` file
   * @param {object} [options] session options of the runtime
   * @returns {Promise<CausalLM>}
   * @throws {ModelError} the runtime cannot load it, or it is another kind of model
   */
  static async load(ort, source, options = {}) {
    let session;
    try {
      session = await ort.InferenceSession.create(source, options);
    } catch (error) {
      throw new ModelError(`${source}: cannot load this model (${reason(error)})`);
    }
    checkNames(session, source);
    return new CausalLM(ort, session, pastShapes(session, source));
  }

  /** Use `CausalLM.load`. */
  constructor(ort, session, past) {
    this.#ort = ort;
    this.#session = session;
    this.#past = past;
  }

  /** Whether the strength can be chosen at run time. */
  get steerable() {
    return this.#session.inputNames.includes(SCALE);
  }

  /**
   * The likeliest continuation, token by token; a stop token is the last one yielded.
   *
   * @param {number[]} promptIds at least one token
   * @param {object} request
   * @param {number} request.maxNewTokens most tokens to yield
   * @param {number} [request.scale] strength: 0 is the base model, 1 as fitted
   * @param {number[]} [request.stopIds] tokens that end the text
   * @returns {AsyncGenerator<number>}
   * @throws {ModelError} an empty prompt, a strength that the model cannot have, a failed run
   */
  async *generate(promptIds, { maxNewTokens, scale = 1, stopIds = [] }) {
    this.checkScale(scale);
    if (!promptIds.length) throw new ModelError('the prompt has no tokens; write some text');
    let cache = this.#emptyCache();
    let fresh = promptIds;
    let length = 0;
    for (let count = 0; count < maxNewTokens; count++) {
      const outputs = await this.#run({ ...this.#tokenFeeds(fresh, length, scale), ...cache });
      cache = this.#nextCache(outputs);
      length += fresh.length;
      const best = argmaxOfLastRow(outputs.logits);
      yield best;
      if (stopIds.includes(best)) return;
      fresh = [best];
    }
  }

  /**
   * Refuse a strength that this model cannot have.
   *
   * @param {number} scale
   * @throws {ModelError}
   */
  checkScale(scale) {
    if (!Number.isFinite(scale)) throw new ModelError(`scale: expected a number, got ${scale}`);
    if (scale === 1 || this.steerable) return;
    throw new ModelError(
      `scale ${scale}: this model has no ${SCALE} input, its strength is fixed; ` +
        'leave the scale at 1',
    );
  }

  async #run(feeds) {
    try {
      return await this.#session.run(feeds);
    } catch (error) {
      throw new ModelError(`the model failed to run (${reason(error)})`);
    }
  }

  #tokenFeeds(fresh, length, scale) {
    const { Tensor } = this.#ort;
    const total = length + fresh.length;
    const feeds = {
      input_ids: this.#int64(fresh),
      attention_mask: this.#int64(Array(total).fill(1)),
    };
    if (this.#session.inputNames.includes('position_ids')) {
      feeds.position_ids = this.#int64(fresh.map((_, index) => length + index));
    }
    // Made anew for every step: onnxruntime-web's worker takes the memory of what it is given.
    if (this.steerable) feeds[SCALE] = new Tensor('float32', [scale], [1]);
    return feeds;
  }

  #int64(values) {
    return new this.#ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
  }

  #emptyCache() {
    const { Tensor } = this.#ort;
    return Object.fromEntries(
      this.#past.map(({ name, heads, size }) => [
        name,
        new Tensor('float32', new Float32Array(0), [1, heads, 0, size]),
      ]),
    );
  }

  #nextCache(outputs) {
    return Object.fromEntries(this.#past.map(({ name }) => [name, outputs[presentOf(name)]]));
  }
}

function presentOf(pastName) {
  return pastName.replace('past_key_values', 'present');
}

function checkNames({ inputNames, outputNames }, source) {
  const past = inputNames.filter((name) => PAST.test(name));
  const missing = [
    ...['input_ids', 'attention_mask'].filter((name) => !inputNames.includes(name)),
    ...(past.length ? [] : ['past_key_values.0.key']),
    ...['logits', ...past.map(presentOf)].filter((name) => !outputNames.includes(name)),
  ];
  const known = [...TOKEN_INPUTS, SCALE, ...past];
  const unknown = inputNames.filter((name) => !known.includes(name));
  if (!missing.length && !unknown.length) return;
  throw new ModelError(
    `${source}: not a causal language model with KV cache in optimum's naming ` +
      `(missing: ${missing.join(', ') || 'nothing'}; unknown: ${unknown.join(', ') || 'nothing'})`,
  );
}

function pastShapes({ inputMetadata, outputMetadata }, source) {
  const past = inputMetadata.filter(({ name }) => PAST.test(name));
  const logits = outputMetadata.find(({ name }) => name === 'logits');
  for (const { name, type } of [...past, logits]) {
    if (type === 'float32') continue;
    throw new ModelError(`${source}: ${name} is ${type}, expected float32; export it in float32`);
  }
  return past.map(({ name, shape: [, heads, , size] }) => {
    if (Number.isInteger(heads) && Number.isInteger(size)) return { name, heads, size };
    throw new ModelError(`${source}: ${name} does not say its heads and their size`);
  });
}

function argmaxOfLastRow({ data, dims }) {
  const row = data.subarray(data.length - dims.at(-1));
  let best = 0;
  for (let token = 1; token < row.length; token++) {
    if (row[token] > row[best]) best = token;
  }
  return best;
}
