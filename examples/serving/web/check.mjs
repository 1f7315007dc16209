#!/usr/bin/env node
/**
 * Use the page as a person would, in a headless Chromium, and print what was seen as JSON.
 *
 *     node check.mjs URL --prompt "Tom" --tokens 20 --scales 0,1
 *
 * It judges nothing: tests/serving/test_web.py does.
 */

import { parseArgs } from 'node:util';

import { chromium } from 'playwright-core';

const ARGS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];

/** Keeps every text that a panel ever showed. */
function watchPanels() {
  window.shown = { base: [], steered: [] };
  document.addEventListener('DOMContentLoaded', () => {
    for (const [id, texts] of Object.entries(window.shown)) {
      const panel = document.getElementById(id);
      const note = () => texts.push(panel.textContent);
      const changes = { childList: true, characterData: true, subtree: true };
      new MutationObserver(note).observe(panel, changes);
    }
  });
}

function record(page) {
  const seen = { errors: [], requests: [] };
  page.on('console', (message) => {
    if (['error', 'warning'].includes(message.type())) seen.errors.push(message.text());
  });
  page.on('pageerror', (error) => seen.errors.push(String(error)));
  page.on('request', (request) => seen.requests.push(request.url()));
  return seen;
}

const reached = (page, ...states) =>
  page.waitForFunction((wanted) => wanted.includes(document.body.dataset.state), states);

/** Move the slider, first to its end and at once, while texts are being written, to `scale`. */
async function moveSlider(page, scale) {
  await page.locator('#scale').fill('2');
  await page.locator('#scale').fill(scale);
  await reached(page, 'done', 'error');
}

async function texts(page) {
  const text = (id) => page.locator(id).textContent();
  return { base: await text('#base'), steered: await text('#steered') };
}

async function usePage(page, { url, prompt, tokens, scales }) {
  await page.goto(url);
  await reached(page, 'ready', 'error');
  if ((await page.locator('body').getAttribute('data-state')) === 'error') return [];
  await page.locator('#prompt').fill(prompt);
  await page.locator('#tokens').fill(tokens);
  await page.locator('#write').click();
  // Not awaited where there is a slider: it moves while both texts are being written.
  if (!scales.length) await reached(page, 'done', 'error');
  const runs = [];
  for (const scale of scales) {
    await moveSlider(page, scale);
    runs.push({ scale: Number(scale), ...(await texts(page)) });
  }
  return runs;
}

async function main() {
  const { values, positionals } = parseArgs({
    options: {
      chromium: { type: 'string', default: '/usr/bin/chromium' },
      prompt: { type: 'string', default: 'Tom' },
      tokens: { type: 'string', default: '20' },
      scales: { type: 'string', default: '' },
      screenshot: { type: 'string' },
    },
    allowPositionals: true,
  });
  const scales = values.scales ? values.scales.split(',') : [];
  const browser = await chromium.launch({ executablePath: values.chromium, args: ARGS });
  try {
    const page = await browser.newPage();
    await page.addInitScript(watchPanels);
    const seen = record(page);
    const runs = await usePage(page, { url: positionals[0], ...values, scales });
    if (values.screenshot) await page.screenshot({ path: values.screenshot, fullPage: true });
    const report = {
      runs,
      ...(await texts(page)),
      shown: await page.evaluate(() => window.shown),
      status: await page.locator('#status').textContent(),
      slider: await page.locator('#scale').isVisible(),
      basePanel: await page.locator('#base-panel').isVisible(),
      ...seen,
    };
    console.log(JSON.stringify(report));
  } finally {
    await browser.close();
  }
}

await main();
