"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const themes = {
    light: {
      text: "#1d2733", grid: "#dfe4ea", band: "rgba(110,120,135,0.28)", surface: "#ffffff",
      scale: [[0, "#f3f6fa"], [0.5, "#5b9bd0"], [1, "#08407a"]],
    },
    dark: {
      text: "#dbe3ec", grid: "#33404e", band: "rgba(150,165,185,0.30)", surface: "#1a222c",
      scale: [[0, "#1c2733"], [0.5, "#2f7ab5"], [1, "#b9e0ff"]],
    },
  };
  const config = { displayModeBar: false, responsive: true };

  function themed(figure, theme) {
    const layout = structuredClone(figure.layout);
    const data = structuredClone(figure.data);
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { family: "system-ui, sans-serif", size: 13, color: theme.text };
    layout.hoverlabel = { bgcolor: theme.surface, font: { color: theme.text } };
    for (const axis of [layout.xaxis, layout.yaxis]) {
      Object.assign(axis, { gridcolor: theme.grid, linecolor: theme.grid, zerolinecolor: theme.grid });
    }
    for (const trace of data) {
      if (trace.type === "heatmap") trace.colorscale = theme.scale;
      if (trace.fill) trace.fillcolor = theme.band;
      if (trace.line && !trace.line.color) trace.line.color = theme.text;
    }
    if (figure.labelled) layout.annotations = cellLabels(data[0], theme.scale);
    return [data, layout];
  }

  /* The colour of a share on a scale of three stops, as [r, g, b]. */
  function shade(scale, share) {
    const upper = share > 0.5 ? 2 : 1;
    const part = share * 2 - (upper - 1);
    const channel = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
    return [1, 3, 5].map((at) => {
      const [low, high] = [channel(scale[upper - 1][1], at), channel(scale[upper][1], at)];
      return low + part * (high - low);
    });
  }

  /* Text in each cell, black or white, whichever stands out more. */
  function cellLabels(trace, scale) {
    return trace.z.flatMap((row, y) => row.map((share, x) => {
      const linear = shade(scale, Math.min(share, 1)).map((value) => (value / 255) ** 2.2);
      const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
      const color = light > 0.18 ? "#000000" : "#ffffff";
      return { x, y, text: `${Math.round(100 * share)}%`, showarrow: false, font: { color } };
    }));
  }

  function draw(theme) {
    for (const [name, figure] of Object.entries(figures)) {
      Plotly.react(name, ...themed(figure, theme), config);
    }
  }

  function current() {
    return dark.matches ? themes.dark : themes.light;
  }

  const choice = document.getElementById("share-layer");
  figures.share.choices.forEach((entry, index) => choice.add(new Option(entry.name, String(index))));
  choice.addEventListener("change", () => {
    figures.share.data[0].z = figures.share.choices[Number(choice.value)].z;
    draw(current());
  });
  dark.addEventListener("change", () => draw(current()));
  window.addEventListener("beforeprint", () => draw(themes.light));
  window.addEventListener("afterprint", () => draw(current()));
  draw(current());
})();
