#!/usr/bin/env node
/**
 * Serve the page and one model folder to this machine: `node serve.mjs FOLDER [--port 8000]`.
 *
 * Any static server can take its place that serves the same folders under the same names.
 */

import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { createServer } from 'node:http';
import { extname, join, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const HOST = '127.0.0.1';
const BAD_INPUT = 2;
const HERE = fileURLToPath(new URL('.', import.meta.url));
const PAGE = new Set(['index.html', 'app.mjs', 'style.css']);

const TYPES = {
  '.css': 'text/css; charset=utf-8',
  '.html': 'text/html; charset=utf-8',
  '.json': 'application/json',
  '.mjs': 'text/javascript; charset=utf-8',
  '.wasm': 'application/wasm',
};

/** The page loads nothing from elsewhere, and the browser sees to it. */
const HEADERS = {
  'Cache-Control': 'no-cache',
  'Content-Security-Policy':
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' data:",
  'X-Content-Type-Options': 'nosniff',
};

/** First part of a path → the folder behind it. */
function folders(model) {
  return {
    common: join(HERE, '../common'),
    model,
    ort: join(HERE, 'node_modules/onnxruntime-web/dist'),
    tokenizers: join(HERE, 'node_modules/@huggingface/tokenizers/dist'),
  };
}

/**
 * The file that a request's path names: a page file, or a file straight in one of the folders.
 *
 * @param {string} path as sent, not normalized
 * @param {Record<string, string>} roots
 * @returns {{status: 200, file: string} | {status: 400 | 403 | 404}}
 */
function locate(path, roots) {
  let parts;
  try {
    parts = decodeURIComponent(path.split(/[?#]/, 1)[0]).split('/').slice(1);
  } catch {
    return { status: 400 };
  }
  // Decoded first, so that no spelling of these gets past; hidden files are nobody's business.
  if (parts.some((part) => part.startsWith('.') || /[\\\0]/.test(part))) return { status: 403 };
  if (parts.length === 1) {
    const name = parts[0] || 'index.html';
    return PAGE.has(name) ? { status: 200, file: join(HERE, name) } : { status: 404 };
  }
  const [root, name] = parts;
  if (parts.length !== 2 || !name || !Object.hasOwn(roots, root)) return { status: 404 };
  return { status: 200, file: join(roots[root], name) };
}

async function answer(request, response, roots) {
  if (!['GET', 'HEAD'].includes(request.method)) return end(response, 405);
  const { status, file } = locate(request.url, roots);
  if (status !== 200) return end(response, status);
  const found = await stat(file).catch(() => null);
  if (!found?.isFile()) return end(response, 404);
  response.writeHead(200, {
    ...HEADERS,
    'Content-Length': found.size,
    'Content-Type': TYPES[extname(file)] ?? 'application/octet-stream',
  });
  if (request.method === 'HEAD') return response.end();
  // A browser that leaves in the middle is no fault of ours.
  return pipeline(createReadStream(file), response).catch(() => response.destroy());
}

function end(response, status) {
  response.writeHead(status, { ...HEADERS, 'Content-Type': 'text/plain' }).end(`${status}\n`);
}

function readArguments() {
  const { values, positionals } = parseArgs({
    options: { port: { type: 'string', default: '8000' } },
    allowPositionals: true,
  });
  const port = Number(values.port);
  if (!Number.isInteger(port) || port < 0 || port > 65535) {
    throw new Error(`--port: expected a number from 0 to 65535, got '${values.port}'`);
  }
  if (positionals.length !== 1) throw new Error('expected node serve.mjs FOLDER [--port 8000]');
  return { folder: resolve(positionals[0]), port };
}

function fail(message) {
  console.error(`serve.mjs: ${message.replaceAll('\n', ' ')}`);
  process.exit(BAD_INPUT);
}

async function main() {
  const { folder, port } = readArguments();
  const model = await stat(join(folder, 'model.onnx')).catch(() => null);
  if (!model?.isFile()) throw new Error(`${folder}: no model.onnx in this folder`);
  const roots = folders(folder);
  const server = createServer((request, response) => answer(request, response, roots));
  server.on('error', (error) => fail(error.message));
  server.listen(port, HOST, () => console.log(`http://${HOST}:${server.address().port}/`));
}

main().catch((error) => fail(error.message));
