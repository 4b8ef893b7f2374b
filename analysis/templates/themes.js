"use strict";
/* Colours of figures: what is themed here is the same on the page and in exported pictures. */
const moietyThemes = (() => {
  const themes = {
    light: {
      text: "#1d2733", grid: "#dfe4ea", band: "rgba(11,92,158,0.16)", surface: "#ffffff",
      first: "#0b5c9e", second: "#c2570c", third: "#00795a", fourth: "#a1427c",
      growing: ["#f3f6fa", "#5b9bd0", "#08407a"],
      diverging: ["#0b5c9e", "#f5f5f2", "#b3431b"],
    },
    dark: {
      text: "#dbe3ec", grid: "#33404e", band: "rgba(124,192,245,0.20)", surface: "#1a222c",
      first: "#7cc0f5", second: "#f0a35e", third: "#4fc9a4", fourth: "#e29cc6",
      growing: ["#1c2733", "#2f7ab5", "#b9e0ff"],
      diverging: ["#6db7f2", "#232c36", "#f0915e"],
    },
  };

  function scaleOf(figure, theme) {
    return theme[figure.scale || "growing"];
  }

  function themed(figure, theme) {
    const layout = structuredClone(figure.layout);
    const data = structuredClone(figure.data);
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { family: "system-ui, sans-serif", size: 13, color: theme.text };
    layout.hoverlabel = { bgcolor: theme.surface, font: { color: theme.text } };
    for (const axis of [layout.xaxis, layout.yaxis]) {
      if (axis) Object.assign(axis, { gridcolor: theme.grid, linecolor: theme.grid, zerolinecolor: theme.grid });
    }
    for (const trace of data) paint(trace, figure, theme);
    if (figure.labelled) layout.annotations = cellLabels(data[0], figure, theme);
    return [data, layout];
  }

  function paint(trace, figure, theme) {
    if (trace.type === "heatmap") trace.colorscale = scaleOf(figure, theme).map((colour, at) => [at / 2, colour]);
    if (trace.type === "bar") {
      trace.marker = { color: theme[trace.accent] };
      if (trace.error_y) trace.error_y.color = theme.text;
    }
    if (trace.fill) trace.fillcolor = theme.band;
    if (trace.type === "scatter") {
      trace.line = trace.line || { width: 2.5 };
      if (!trace.line.color) trace.line.color = trace.accent ? theme[trace.accent] : plain(trace, theme);
    }
    if (trace.type === "sankey") trace.textfont = { color: theme.text };
    delete trace.accent;
  }

  function plain(trace, theme) {
    return trace.line.dash ? theme.text : theme.first;
  }

  /* The colour of a share of a scale of three stops, as [r, g, b]. */
  function shade(scale, share) {
    const upper = share > 0.5 ? 2 : 1;
    const part = share * 2 - (upper - 1);
    const channel = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
    return [1, 3, 5].map((at) => {
      const [low, high] = [channel(scale[upper - 1], at), channel(scale[upper], at)];
      return low + part * (high - low);
    });
  }

  /* d3's formats that figures use: .2f, +.3f, .0% */
  function written(value, form) {
    const digits = Number(/\.(\d)/.exec(form || ".0%")[1]);
    const text = (form || "%").endsWith("%") ? `${(100 * value).toFixed(digits)}%` : value.toFixed(digits);
    return form && form.startsWith("+") && value >= 0 ? `+${text}` : text;
  }

  /* Text in each cell, black or white, whichever stands out more. */
  function cellLabels(trace, figure, theme) {
    const [low, high] = [trace.zmin, trace.zmax];
    return trace.z.flatMap((row, y) => row.map((value, x) => {
      if (value === null) return { x, y, text: "–", showarrow: false, font: { color: theme.text } };
      const share = Math.max(0, Math.min(1, (value - low) / (high - low)));
      const linear = shade(scaleOf(figure, theme), share).map((one) => (one / 255) ** 2.2);
      const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
      const color = light > 0.18 ? "#000000" : "#ffffff";
      return { x, y, text: written(value, figure.form), showarrow: false, font: { color, size: 12 } };
    }));
  }

  return { ...themes, themed };
})();
