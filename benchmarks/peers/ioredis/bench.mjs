// ioredis on Node, no framework: pipelines of 100, reads of 100 with one XACK for all, JSON.parse of each event.
// As the Python peers: bench.mjs URL EVENTS SIZE, one JSON object. See tally.py.

import { createRequire } from "node:module";

const require = createRequire(`${process.env.PEER_HOME}/`);
const Redis = require("ioredis");
const BATCH = 100;

const [url, eventsText, sizeText] = process.argv.slice(2);
const events = Number(eventsText), size = Number(sizeText);
const client = new Redis(url);
const times = new Uint8Array(events);

function event(number) {
  const bare = { number, customer: `c-${String(number % 1000).padStart(6, "0")}`, remark: "" };
  return { ...bare, remark: "-".repeat(size - JSON.stringify(bare).length) };
}

// The seven fields that the engine's limit is measured with.
function entry(number) {
  const id = String(number).padStart(21, "0");
  const bare = ["id", id, "type", "bench.sale", "source", "bench", "time", "", "subject", "", "headers", ""];
  return [...bare, "data", JSON.stringify(event(number))];
}

async function rateOf(count, work) {
  const began = performance.now();
  await work();
  return Math.round(count / (performance.now() - began) * 1000);
}

async function publishOne(entries) {
  for (const fields of entries) await client.xadd("few", "*", ...fields);
}

async function publishMany(entries) {
  for (let begin = 0; begin < entries.length; begin += BATCH) {
    const pipeline = client.pipeline();
    for (const fields of entries.slice(begin, begin + BATCH)) pipeline.xadd("sales", "*", ...fields);
    await pipeline.exec();
  }
}

async function handle(sale) {
  times[sale.number] += 1;
}

async function consume() {
  for (let left = events; left > 0;) {
    const [[, batch]] = await client.xreadgroup("GROUP", "group", "me", "COUNT", BATCH, "STREAMS", "sales", ">");
    for (const [, fields] of batch) await handle(JSON.parse(fields.at(-1)));
    await client.xack("sales", "group", ...batch.map(([position]) => position));
    left -= batch.length;
  }
}

const entries = Array.from({ length: events }, (_, number) => entry(number));
const few = entries.slice(0, Math.max(20, events / 20));
const rates = {
  "publish-one": await rateOf(few.length, () => publishOne(few)),
  "publish-many": await rateOf(events, () => publishMany(entries)),
};
await client.xgroup("CREATE", "sales", "group", "0");
rates.handle = await rateOf(events, consume);
client.disconnect();
if (times.some((count) => count !== 1)) throw new Error("not every event was handled exactly once");
console.log(JSON.stringify({ version: require("ioredis/package.json").version, events, rates }));
