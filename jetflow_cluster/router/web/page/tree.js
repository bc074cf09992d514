// One draft tree as SVG: depths from left to right, the kept path in the top row, likelier nodes in stronger colour.

const WIDTH = 104, HEIGHT = 24, GAP_X = 26, GAP_Y = 7, TOP = 20, MAX_CHARS = 8;
const NAMES = { head: "the draft head", context: "the text so far", head_and_context: "the draft head and the text so far" };

export function drawTree(step) {
  const tree = step.tree, kept = new Set(tree.accepted_nodes), last = tree.accepted_nodes.at(-1);
  const hasOwn = step.ids.length >= tree.accepted_nodes.length;
  const children = tree.parents.map(() => []);
  const depths = tree.parents.map(() => 0);
  tree.parents.forEach((parent, node) => {
    if (!node) return;
    depths[node] = depths[parent] + 1;
    if (kept.has(node)) children[parent].unshift(node);
    else children[parent].push(node);
  });
  const own = tree.parents.length;
  if (hasOwn) {
    children[last].unshift(own);
    children.push([]);
    depths.push(depths[last] + 1);
  }
  const rows = leafRows(children);
  const at = (node) => ({ x: 1 + depths[node] * (WIDTH + GAP_X), y: TOP + rows[node] * (HEIGHT + GAP_Y) });
  const columns = Math.max(...depths) + 1;
  const svg = make("svg", {
    width: columns * (WIDTH + GAP_X) - GAP_X + 2, height: TOP + (Math.max(...rows) + 1) * (HEIGHT + GAP_Y), role: "img",
  });
  for (let d = 0; d < columns; d++) {
    const x = 1 + d * (WIDTH + GAP_X);
    svg.append(make("text", { class: "depth", x, y: 12 }, d ? `+${d}` : "last token"));
  }
  for (let node = 1; node < own; node++) {
    svg.append(edge(at(tree.parents[node]), at(node), kept.has(node)));
  }
  if (hasOwn) svg.append(edge(at(last), at(own), true));
  for (let node = 0; node < own; node++) svg.append(drawNode(tree, node, at(node), kept.has(node)));
  if (hasOwn) {
    const text = step.texts.at(-1), id = step.ids.at(-1);
    svg.append(box(at(own), "node own", {}, text, id, `token ${id} ${JSON.stringify(text)}: the model's own`));
  }
  return svg;
}

// Leaves take rows in depth-first order, inner nodes that of their first child.
function leafRows(children) {
  const rows = children.map(() => 0), stack = [0];
  let next = 0;
  while (stack.length) {
    const node = stack.pop();
    rows[node] = next;
    if (children[node].length) stack.push(...children[node].toReversed());
    else next++;
  }
  return rows;
}

function drawNode(tree, node, place, isKept) {
  const text = tree.token_texts[node], id = tree.token_ids[node], source = tree.sources[node];
  if (!node) return box(place, "node root kept", {}, text, id, `token ${id} ${JSON.stringify(text)}: the last one before`);
  const path = Math.exp(tree.path_logprobs[node]);
  const chance = Math.exp(tree.path_logprobs[node] - tree.path_logprobs[tree.parents[node]]);
  const title = `token ${id} ${JSON.stringify(text)}: ${percent(chance)} behind its parent, ${percent(path)} as a path; ` +
    `guessed by ${NAMES[source]}`;
  const kind = `node ${source === "context" ? "context" : "head"}${isKept ? " kept" : ""}`;
  const group = box(place, kind, { "fill-opacity": (0.06 + 0.4 * Math.sqrt(path)).toFixed(3) }, text, id, title);
  const label = `${Math.round(100 * chance)}%`;
  group.append(make("text", { class: "chance", x: place.x + WIDTH - 4, y: place.y + 16, "text-anchor": "end" }, label));
  return group;
}

function box({ x, y }, kind, more, text, id, title) {
  const group = make("g", {});
  group.append(make("title", {}, title));
  group.append(make("rect", { class: kind, x, y, width: WIDTH, height: HEIGHT, rx: 4, ...more }));
  group.append(make("text", { x: x + 6, y: y + 16 }, labelOf(text, id)));
  return group;
}

function edge(start, end, isKept) {
  const x0 = start.x + WIDTH, y0 = start.y + HEIGHT / 2, y1 = end.y + HEIGHT / 2, middle = (x0 + end.x) / 2;
  const d = `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${end.x} ${y1}`;
  return make("path", { class: isKept ? "edge kept" : "edge", d });
}

function labelOf(text, id) {
  let shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
  if (/[\p{Cc}\p{Cn}\ufffd]/u.test(shown) || !shown) shown = `#${id}`;
  const chars = [...shown];
  return chars.length > MAX_CHARS ? chars.slice(0, MAX_CHARS - 1).join("") + "…" : shown;
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

function make(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
