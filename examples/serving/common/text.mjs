/** Text of a model folder: its tokenizer, where a text ends, and text that grows. */

import { ModelError, reason } from './causal_lm.mjs';

/** A replacement character at the end stands for bytes of a character that is not complete. */
const UNFINISHED = /\uFFFD+$/;

const KNOWN_TYPES = ['BPE', 'Unigram', 'WordPiece'];

/**
 * Read what turns text into tokens and back from a model folder.
 *
 * @param {(name: string) => Promise<object | null>} readJson a file of the folder, null if absent
 * @param {Function} Tokenizer the class of `@huggingface/tokenizers`
 * @returns {Promise<{tokenizer: object, stopIds: number[], contextLength: number}>}
 * @throws {ModelError} no tokenizer, or one with a part that the library does not know
 */
export async function loadText(readJson, Tokenizer) {
  const names = ['tokenizer', 'tokenizer_config', 'config', 'generation_config'];
  const [core, settings, config, generation] = await Promise.all(
    names.map((name) => readJson(`${name}.json`)),
  );
  if (!core) throw new ModelError('tokenizer.json is missing; put it beside model.onnx');
  return {
    tokenizer: makeTokenizer(core, settings, Tokenizer),
    stopIds: [generation?.eos_token_id ?? config?.eos_token_id ?? []].flat(),
    contextLength: config?.max_position_embeddings ?? config?.n_positions ?? Infinity,
  };
}

function makeTokenizer(core, settings, Tokenizer) {
  // The library takes any other type for one of these, and returns wrong tokens without a word.
  if (!KNOWN_TYPES.includes(core.model?.type)) {
    throw new ModelError(
      `tokenizer.json: its model is '${core.model?.type}', expected ${KNOWN_TYPES.join(', ')}`,
    );
  }
  try {
    // The library's own default differs from that of transformers.
    return new Tokenizer(core, { clean_up_tokenization_spaces: false, ...settings });
  } catch (error) {
    throw new ModelError(`tokenizer.json: cannot use this tokenizer (${reason(error)})`);
  }
}

/**
 * How many tokens may follow a prompt.
 *
 * @param {number} promptLength
 * @param {number} wanted
 * @param {number} contextLength
 * @returns {number}
 * @throws {ModelError} the prompt alone fills the context
 */
export function roomFor(promptLength, wanted, contextLength) {
  if (promptLength < contextLength) return Math.min(wanted, contextLength - promptLength);
  throw new ModelError(
    `the prompt has ${promptLength} tokens, the model's context ${contextLength}; shorten it`,
  );
}

/** Prompt and continuation as one text that grows with every token. */
export class Transcript {
  #tokenizer;
  #ids;

  /**
   * @param {object} tokenizer
   * @param {number[]} promptIds
   */
  constructor(tokenizer, promptIds) {
    this.#tokenizer = tokenizer;
    this.#ids = [...promptIds];
  }

  /** @param {number} id the next token */
  push(id) {
    this.#ids.push(id);
  }

  /** The text as it is now. Decoded as a whole: a token's text depends on those before it. */
  get text() {
    if (!this.#ids.length) return '';
    return this.#tokenizer.decode(this.#ids, { skip_special_tokens: true });
  }

  /** The part of the text that later tokens cannot change. */
  get settled() {
    return this.text.replace(UNFINISHED, '');
  }
}
