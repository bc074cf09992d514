// The page: a request with trees, shown as it comes, and behind it the same request token by token.

import { Answer } from "./answer.js";
import { ApiError, chunksOf, getJson } from "./stream.js";
import { drawTree } from "./tree.js";

const EXAMPLE = `class Stack:
    """A last-in, first-out stack."""

    def __init__(self):
        self._items = []

    def push(self, item):
`;
const find = (id) => document.getElementById(id);
let stopper = null, answer = new Answer(), chosen = 0, follows = true;

find("prompt").value = EXAMPLE;
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
find("stop").addEventListener("click", () => stopper?.abort());
find("slider").addEventListener("input", () => choose(Number(find("slider").value)));
find("before").addEventListener("click", () => choose(chosen - 1));
find("after").addEventListener("click", () => choose(chosen + 1));
find("token").addEventListener("change", showModel);
showModel();

async function showModel() {
  try {
    // Where a token is needed, nothing is asked for before it is there.
    const { data } = await getJson("v1/models", find("token").value);
    const [model] = data;
    find("model").textContent = `${model.id}, ${model.has_draft_head ? "with" : "without"} a draft head`;
    find("chat-label").hidden = !model.has_chat_template;
    fail("");
  } catch (error) {
    fail(error.message);
  }
}

async function run() {
  stopper = new AbortController();
  setRunning(true);
  clear();
  const seed = find("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(find("seed").value);
  try {
    status("with trees …");
    await ask(find("mode").value, seed, answer, "trees", showStep);
    find("output").append(answer.tail);
    status("the same request, token by token …");
    const plain = new Answer();
    await ask("off", seed, plain, "plain", () => compare(plain, false));
    compare(plain, true);
    status(find("temperature").value > 0 ? `done; seed ${seed}` : "done");
  } catch (error) {
    if (error.name === "AbortError") status("stopped");
    else fail(error instanceof ApiError ? error.message : `the server cannot be reached (${error.message})`);
  }
  setRunning(false);
}

async function ask(mode, seed, into, column, onStep) {
  const text = find("prompt").value, isChat = find("chat").checked && !find("chat-label").hidden;
  const body = {
    max_tokens: Number(find("max-tokens").value), temperature: Number(find("temperature").value), seed,
    stream: true, speculation: { mode, include_trees: true },
    ...(isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
  };
  const path = isChat ? "v1/chat/completions" : "v1/completions";
  for await (const chunk of chunksOf(path, body, find("token").value, stopper.signal)) {
    const step = into.add(chunk);
    if (step) onStep(step, into.steps.length - 1);
    showNumbers(into, column);
  }
}

function showStep(step, index) {
  const output = find("output"), isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  step.spans = step.parts.map((part, i) => {
    const span = document.createElement("span");
    span.className = `token ${step.kinds[i]}`;
    span.textContent = part;
    span.title = `step ${index}`;
    span.addEventListener("click", () => choose(index));
    output.append(span);
    return span;
  });
  if (isAtEnd) output.scrollTop = output.scrollHeight;
  find("slider").max = index;
  if (follows) show(index);
  enableSteps();
}

function choose(index) {
  follows = index === answer.steps.length - 1;
  show(index);
  enableSteps();
}

function show(index) {
  for (const span of answer.steps[chosen]?.spans ?? []) span.classList.remove("now");
  chosen = index;
  const step = answer.steps[index], tree = find("tree");
  for (const span of step.spans) span.classList.add("now");
  find("slider").value = index;
  find("step-name").textContent = `Step ${index}`;
  if (!step.tree) {
    find("step-note").textContent = "the pass over the prompt, which gave the first token";
    tree.replaceChildren();
    return;
  }
  const guesses = step.tree.parents.length - 1, kept = step.tree.accepted_nodes.length - 1;
  const what = guesses ? `${guesses} guesses checked, ${kept} kept` : "no guesses";
  find("step-note").textContent = `${what}, ${step.ids.length} tokens written`;
  tree.replaceChildren(drawTree(step));
}

function showNumbers(given, column) {
  const put = (name, value, digits) => {
    find(`${column}-${name}`).textContent = Number.isFinite(value) ? value.toFixed(digits) : "–";
  };
  put("rate", given.rate, 0);
  put("length", given.length, 2);
  put("checked", given.numChecked, 0);
  put("kept", given.numKept, 0);
  put("tokens", given.ids.length, 0);
  find(`${column}-share`).textContent = Number.isFinite(given.share) ? `${Math.round(100 * given.share)}%` : "–";
}

function compare(plain, isWhole) {
  const num = plain.ids.length, verdict = find("verdict");
  const different = plain.ids.findIndex((id, i) => id !== answer.ids[i]);
  const isSame = different < 0 && (!isWhole || num === answer.ids.length);
  verdict.textContent = isSame ? (isWhole ? "identical" : "…") : "different";
  verdict.className = isSame ? (isWhole ? "good" : "") : "bad";
  const at = different < 0 ? Math.min(num, answer.ids.length) : different;
  find("verdict-note").textContent = isSame ? `all ${num} tokens so far compared` : `from token ${at} on`;
  if (!isWhole) return;
  if (isSame) find("verdict-note").textContent = `all ${num} tokens compared`;
  const ratio = answer.rate / plain.rate;
  find("ratio").textContent = Number.isFinite(ratio) ? `${ratio.toFixed(2)}×` : "–";
  find("ratio").className = ratio > 1 ? "good" : "";
}

function clear() {
  answer = new Answer();
  chosen = 0;
  follows = true;
  fail("");
  find("asked").textContent = find("prompt").value;
  find("output").replaceChildren(find("asked"));
  find("tree").replaceChildren();
  find("step-name").textContent = "The tree of a step";
  for (const id of ["ratio", "verdict"]) {
    find(id).textContent = "–";
    find(id).className = "";
  }
  find("verdict-note").textContent = "outputs compared token by token";
  for (const cell of document.querySelectorAll("td, #step-note")) cell.textContent = "";
  enableSteps();
}

function enableSteps() {
  const last = answer.steps.length - 1;
  find("slider").disabled = last < 1;
  find("before").disabled = chosen <= 0;
  find("after").disabled = chosen >= last;
}

function setRunning(isRunning) {
  find("run").disabled = isRunning;
  find("stop").disabled = !isRunning;
}

function status(text) {
  find("status").textContent = text;
}

function fail(text) {
  find("error").textContent = text;
  find("error").hidden = !text;
  if (text) status("");
}
