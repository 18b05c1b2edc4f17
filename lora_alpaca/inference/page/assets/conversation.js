// A conversation: value is {turns: [{question, answer, note, running}], examples: [text], hello}.
const log = element.querySelector(".log");
const rows = [];
let atEnd = true;
log.addEventListener("scroll", () => (atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40));

const row = (number) => {
  const turn = make("article", "turn");
  const question = make("div", "question");
  const asked = make("div", "text");
  const answer = make("div", "answer");
  const said = make("div", "text");
  const note = make("span", "note");
  const foot = make("div", "foot");
  const askedTools = make("div", "tools");
  const saidTools = make("span", "tools last");
  const edit = () => {
    const box = make("textarea", "edit");
    const bar = make("div", "tools");
    const leave = () => {
      box.remove();
      bar.remove();
      turn.classList.remove("editing");
    };
    const save = () => {
      leave();
      trigger("edit", { index: number, text: box.value });
    };
    box.value = props.value.turns[number].question;
    box.rows = Math.min(10, box.value.split("\n").length + 1);
    box.setAttribute("aria-label", "Edit the message");
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      save();
    });
    bar.append(tool("Send", save), tool("Cancel", leave));
    turn.classList.add("editing");
    question.append(box, bar);
    box.focus();
  };
  askedTools.append(copier(() => props.value.turns[number].question), tool("Edit", edit));
  saidTools.append(
    copier(() => props.value.turns[number].answer),
    tool("Retry", () => trigger("retry", {})),
    tool("Undo", () => trigger("undo", {})),
  );
  question.append(asked, askedTools);
  foot.append(note, saidTools);
  answer.append(said, foot);
  turn.append(question, answer);
  return { turn, asked, said, note };
};

const hello = (value) => {
  const box = make("div", "hello");
  box.append(make("p", "", value.hello));
  const list = make("div", "examples");
  for (const text of value.examples) {
    const button = make("button", "example", text);
    button.type = "button";
    button.addEventListener("click", () => trigger("example_select", { text }));
    list.append(button);
  }
  box.append(list);
  return box;
};

const draw = () => {
  const value = props.value || { turns: [], examples: [], hello: "" };
  const running = value.turns.some((turn) => turn.running);
  log.querySelector(".hello")?.remove();
  if (!value.turns.length) log.append(hello(value));
  while (rows.length > value.turns.length) rows.pop().turn.remove();
  const more = value.turns.length > rows.length;
  while (rows.length < value.turns.length) {
    rows.push(row(rows.length));
    log.append(rows.at(-1).turn);
  }
  value.turns.forEach((turn, number) => {
    const { turn: node, asked, said, note } = rows[number];
    grow(asked, turn.question);
    grow(said, turn.answer);
    grow(note, turn.note);
    node.classList.toggle("running", turn.running);
    node.classList.toggle("final", number === value.turns.length - 1);
  });
  log.classList.toggle("busy", running);
  log.setAttribute("aria-busy", running);
  if (atEnd || more) log.scrollTop = log.scrollHeight;
};
watch("value", draw);
draw();
setTimeout(() => {  // where that opens no keyboard on the screen, and nobody writes elsewhere yet
  const idle = matchMedia("(pointer: fine)").matches && document.activeElement === document.body;
  if (idle) document.querySelector("#message textarea")?.focus({ preventScroll: true });
}, 300);
