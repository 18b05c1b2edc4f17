// Answers side by side: value is {sides: [{name, parts: [[text, marked]], note, running}], expected, summary}.
const grid = element.querySelector(".sides");
const summary = element.querySelector(".summary");
const panes = [];

const pane = () => {
  const node = make("section", "side");
  const name = make("h3");
  const text = make("div", "text");
  const note = make("span", "note");
  const foot = make("div", "foot");
  const tools = make("span", "tools");
  tools.append(copier(() => text.textContent));
  foot.append(note, tools);
  node.append(name, text, foot);
  return { node, name, text, note };
};

const fill = (node, parts) => {
  if (parts.length < 2 && !parts.some((part) => part[1])) {
    if (node.querySelector("mark")) node.replaceChildren();
    grow(node, parts.map((part) => part[0]).join(""));
  } else {
    node.replaceChildren(...parts.map(([text, marked]) => make(marked ? "mark" : "span", "", text)));
  }
};

const draw = () => {
  const value = props.value || { sides: [] };
  const shown = value.sides.slice();
  if (value.expected) {
    shown.push({ name: "Expected", parts: [[value.expected, false]], note: "from the validation rows", running: false });
  }
  while (panes.length > shown.length) panes.pop().node.remove();
  while (panes.length < shown.length) {
    panes.push(pane());
    grid.append(panes.at(-1).node);
  }
  shown.forEach((side, number) => {
    const { node, name, text, note } = panes[number];
    grow(name, side.name);
    fill(text, side.parts);
    grow(note, side.note);
    node.classList.toggle("running", side.running);
    node.classList.toggle("expected", number >= value.sides.length);
    node.dataset.side = number;
  });
  grow(summary, value.summary || "");
};
watch("value", draw);
draw();
