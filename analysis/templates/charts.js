"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { displayModeBar: false, responsive: true };
  const drawn = new Set();
  let theme = current();

  function current() {
    return dark.matches ? moietyThemes.dark : moietyThemes.light;
  }

  function draw(name) {
    drawn.add(name);
    Plotly.react(name, ...moietyThemes.themed(figures[name], theme), config);
  }

  function redraw(chosen) {
    if (chosen === theme) return;
    theme = chosen;
    drawn.forEach(draw);
  }

  /* Streams are drawn over several frames, which a printer does not wait for: they keep their text. */
  function redrawForPrint() {
    const streams = Object.keys(figures).filter((name) => figures[name].data[0].type === "sankey");
    streams.forEach((name) => drawn.delete(name));
    redraw(moietyThemes.light);
    streams.forEach((name) => drawn.add(name));
  }

  function openDetails(open) {
    document.querySelectorAll("details").forEach((node) => { node.open = open; });
  }

  function offerChoices(name) {
    const box = document.getElementById(`${name}-choice`);
    const figure = figures[name];
    figure.choices.forEach((entry, index) => box.add(new Option(entry.name, String(index))));
    box.addEventListener("change", () => {
      const entry = figure.choices[Number(box.value)];
      if (entry.data) figure.data = entry.data;
      else figure.data[0].z = entry.z;
      draw(name);
    });
  }

  /* Figures are drawn one after the other, so that a long page can be read meanwhile. */
  function drawNext(names) {
    if (names.length === 0) {
      document.documentElement.dataset.drawn = String(Math.round(performance.now()));
      return;
    }
    if (!drawn.has(names[0])) draw(names[0]);
    setTimeout(drawNext, 0, names.slice(1));
  }

  for (const [name, figure] of Object.entries(figures)) {
    document.getElementById(name).style.minHeight = `${figure.layout.height}px`;
    if (figure.choices) offerChoices(name);
  }
  setTimeout(drawNext, 0, Object.keys(figures));
  dark.addEventListener("change", () => redraw(current()));
  window.addEventListener("beforeprint", () => {
    openDetails(true);
    redrawForPrint();
  });
  window.addEventListener("afterprint", () => {
    openDetails(false);
    redraw(current());
  });
})();
