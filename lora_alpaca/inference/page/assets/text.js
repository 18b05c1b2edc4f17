// What the views share. Text is only ever set as text, so that nothing in it is read as HTML.
const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
// Sets the text of a node; what is there already stays, and with it what a reader has selected.
const grow = (node, text) => {
  const old = node.textContent;
  if (text === old) return;
  const only = node.childNodes.length === 1 && node.firstChild.nodeType === Node.TEXT_NODE;
  if (only && text.startsWith(old)) node.firstChild.appendData(text.slice(old.length));
  else node.textContent = text;
};
const tool = (label, act) => {
  const button = make("button", "tool", label);
  button.type = "button";
  button.addEventListener("click", () => act(button));
  return button;
};
const copier = (text) =>
  tool("Copy", async (button) => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {  // a browser gives the clipboard to secure addresses only
      const box = make("textarea");
      box.value = text();
      document.body.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1200);
  });
