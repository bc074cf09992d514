// What one request gave so far: its steps, its numbers.

export class Answer {
  constructor() {
    this.steps = [];
    this.ids = [];
    this.numSteps = this.numChecked = this.numKept = 0;
    this.firstAt = this.lastAt = 0;
    this.summary = null;
    // Text that only the end made certain.
    this.tail = "";
  }

  // Takes a chunk of the stream; returns the step that it added, or null.
  add(chunk) {
    const told = chunk.jetflow;
    if (told && told.timing) {
      this.summary = told;
      return null;
    }
    const choice = chunk.choices[0];
    if (!told || !choice) return null;
    const text = choice.text ?? choice.delta.content ?? "";
    if (!told.token_ids.length) {
      this.tail += text;
      return null;
    }
    this.lastAt = performance.now();
    this.firstAt ||= this.lastAt;
    const step = { ids: told.token_ids, texts: told.token_texts, tree: told.tree, parts: [], kinds: [] };
    step.parts = partsOf(text, told.token_texts);
    step.kinds = told.token_ids.map((_, i) => kindOf(told, i));
    this.ids.push(...told.token_ids);
    if (told.tree) {
      this.numSteps++;
      this.numChecked += told.tree.parents.length - 1;
      this.numKept += told.num_accepted;
    }
    this.steps.push(step);
    return step;
  }

  // Tokens per second behind the first ones: by the server's clock at the end, by this one's before.
  get rate() {
    if (this.summary) {
      const { total_s: total, time_to_first_token_s: first } = this.summary.timing;
      return (this.ids.length - 1) / (total - first);
    }
    const num = this.ids.length - (this.steps[0]?.ids.length ?? 0);
    return (1000 * num) / (this.lastAt - this.firstAt);
  }

  get length() {
    return this.numSteps ? 1 + this.numKept / this.numSteps : NaN;
  }

  get share() {
    return this.ids.length ? this.numKept / this.ids.length : NaN;
  }
}

// The step's text, token by token; characters that came late belong to the last token.
function partsOf(text, tokenTexts) {
  let rest = text;
  return tokenTexts.map((part, i) => {
    if (i === tokenTexts.length - 1) return rest;
    if (!rest.startsWith(part)) return "";
    rest = rest.slice(part.length);
    return part;
  });
}

function kindOf(told, i) {
  if (i >= told.num_accepted || !told.tree) return "own";
  return told.tree.sources[told.tree.accepted_nodes[i + 1]] === "context" ? "context" : "kept";
}
