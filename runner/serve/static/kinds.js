// Which figures and charts there are for each kind of model.

import { seconds } from "/static/elements.js";

const mean = (times) => (times.count ? times.total_s / times.count : null);
const highest = (times) => (times.count ? times.max_s : null);
const number = (value) => (value === null ? "-" : value.toFixed(value < 10 ? 1 : 0));
const count = (value) => (value === null ? "-" : String(value));
const percent = (value) => (value === null ? "-" : `${(value * 100).toFixed(1)} %`);

// The last slot that is over.
const aSecond = (status, what) => ((status.slots.find((slot) => slot.slots_ago === 1)?.[what] ?? 0) / status.slot_s).toFixed(1);

// `value` is null where a slot had none; `empty` stands for a slot in which nothing happened.
const rate = (title, what) => ({ title, value: (slot, status) => slot[what] / status.slot_s, empty: 0, show: number });
const gauge = (title, what, show = count) => ({ title, value: (slot) => slot[what], empty: 0, show });
const times = (title, what) => ({ title, value: (slot) => mean(slot[what]), second: (slot) => highest(slot[what]), empty: null, show: seconds });

export const KINDS = {
  language: {
    hasPrompt: true,
    figures: (status) => {
      const load = status.load ?? { num_running: 0, num_waiting: 0, cache_usage: 0, num_preempted: 0, prompt_tokens: 0, cached_tokens: 0 };
      const reused = load.prompt_tokens ? `${((100 * load.cached_tokens) / load.prompt_tokens).toFixed(0)} %` : "-";
      return [
        ["In the batch", `${load.num_running} of ${status.limits.running}`],
        ["Waiting", `${load.num_waiting} of ${status.limits.waiting}`],
        ["Tokens a second", aSecond(status, "tokens")],
        ["KV cache in use", percent(load.cache_usage)],
        ["Prompt reused", reused],
        ["Gave way", load.num_preempted],
      ];
    },
    charts: [
      rate("Tokens a second", "tokens"),
      gauge("Requests in the batch", "running"),
      gauge("Requests waiting", "waiting"),
      gauge("KV cache in use", "cache_usage", percent),
      times("Time to first token", "first_token"),
      times("Between tokens", "inter_token"),
      times("Whole request", "end_to_end"),
      gauge("Requests that failed", "failed"),
    ],
  },
  tensor: {
    hasPrompt: false,
    figures: (status) => [
      ["Samples in batches", status.load.num_running],
      ["Samples waiting", `${status.load.num_waiting} of ${status.limits.waiting}`],
      ["Samples a second", aSecond(status, "samples")],
      ["Batches a second", aSecond(status, "batches")],
      ["Batch limit", status.limits.batch],
    ],
    charts: [
      rate("Samples a second", "samples"),
      { title: "Samples of a batch", value: (slot) => (slot.batches ? slot.samples / slot.batches : null), empty: null, show: number },
      gauge("Samples in batches", "running"),
      gauge("Samples waiting", "waiting"),
      times("Wait for a batch", "wait"),
      times("Batch", "batch"),
      times("Whole request", "end_to_end"),
      gauge("Requests that failed", "failed"),
    ],
  },
};
