#!/usr/bin/env node
/** Greedy text of a model folder on onnxruntime-node; `--help` says how. */

import { readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { Tokenizer } from '@huggingface/tokenizers';
import ort from 'onnxruntime-node';

import { CausalLM, ModelError, reason } from '../common/causal_lm.mjs';
import { loadText, roomFor, Transcript } from '../common/text.mjs';

const USAGE = `node generate.mjs FOLDER "prompt" [options]

FOLDER holds model.onnx, tokenizer.json and config.json.

  --scale NUMBER   strength: 0 is the base model, 1 as fitted (default 1)
  --tokens NUMBER  most tokens to add (default 40)
  --ids 1,2,3      the prompt as token ids, in place of text
  --json           print {"prompt_ids", "ids", "text"} at the end, in place of growing text
  --threads NUMBER threads per operator (default: the runtime's choice)`;

const BAD_INPUT = 2;
/** The runtime logs what it throws as well; errors are said once, by this script. */
const FATAL_ONLY = 4;

function readArguments() {
  const string = (value) => ({ type: 'string', default: value });
  const options = {
    scale: string('1'),
    tokens: string('40'),
    threads: string('0'),
    ids: { type: 'string' },
    json: { type: 'boolean', default: false },
    help: { type: 'boolean', short: 'h', default: false },
  };
  let parsed;
  try {
    parsed = parseArgs({ options, allowPositionals: true });
  } catch (error) {
    throw new ModelError(error.message.replaceAll('\n', ' '));
  }
  const { values, positionals } = parsed;
  if (values.help) return { help: true };
  if (positionals.length !== (values.ids === undefined ? 2 : 1)) {
    throw new ModelError('expected FOLDER and either a prompt or --ids; see --help');
  }
  return {
    folder: positionals[0],
    prompt: positionals[1],
    ids: values.ids?.split(',').map((text) => wholeNumber('--ids', text)),
    scale: number('--scale', values.scale),
    tokens: wholeNumber('--tokens', values.tokens),
    threads: wholeNumber('--threads', values.threads),
    json: values.json,
  };
}

function number(name, text) {
  const value = text.trim() ? Number(text) : NaN;
  if (Number.isFinite(value)) return value;
  throw new ModelError(`${name}: expected a number, got '${text}'`);
}

function wholeNumber(name, text) {
  const value = number(name, text);
  if (Number.isSafeInteger(value) && value >= 0) return value;
  throw new ModelError(`${name}: expected a whole number from 0, got '${text}'`);
}

async function checkFolder(folder) {
  const found = await stat(folder).catch(() => null);
  if (!found?.isDirectory()) throw new ModelError(`${folder}: no such folder`);
}

async function readJson(path) {
  try {
    return JSON.parse(await readFile(path, 'utf8'));
  } catch (error) {
    if (error.code === 'ENOENT') return null;
    throw new ModelError(`${path}: cannot read this file (${reason(error)})`);
  }
}

async function load({ folder, threads }) {
  await checkFolder(folder);
  const text = await loadText((name) => readJson(join(folder, name)), Tokenizer);
  const model = await CausalLM.load(ort, join(folder, 'model.onnx'), {
    intraOpNumThreads: threads,
    logSeverityLevel: FATAL_ONLY,
  });
  return { model, ...text };
}

async function generate(request) {
  const { model, tokenizer, stopIds, contextLength } = await load(request);
  const promptIds = request.ids ?? tokenizer.encode(request.prompt).ids;
  const transcript = new Transcript(tokenizer, promptIds);
  const ids = [];
  let shown = 0;
  const show = (text) => {
    if (!request.json) process.stdout.write(text.slice(shown));
    shown = text.length;
  };
  const maxNewTokens = roomFor(promptIds.length, request.tokens, contextLength);
  const { scale } = request;
  for await (const id of model.generate(promptIds, { maxNewTokens, scale, stopIds })) {
    ids.push(id);
    transcript.push(id);
    show(transcript.settled);
  }
  show(`${transcript.text}\n`);
  if (request.json) {
    console.log(JSON.stringify({ prompt_ids: promptIds, ids, text: transcript.text }));
  }
}

try {
  const request = readArguments();
  if (request.help) console.log(USAGE);
  else await generate(request);
} catch (error) {
  // Anything else is a fault in this script, and its trace is wanted.
  if (!(error instanceof ModelError)) throw error;
  console.error(`generate.mjs: ${error.message}`);
  process.exitCode = BAD_INPUT;
}
