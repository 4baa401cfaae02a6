// Shows the values of the step under the pointer: each strip of a chart has them in its <title>.
addEventListener("pointerover", ({target}) => {
  const title = target.querySelector(":scope > title");
  const output = target.closest("figure")?.querySelector("output");
  if (title && output) output.textContent = title.textContent;
});
