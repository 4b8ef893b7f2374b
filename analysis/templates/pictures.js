"use strict";
(async () => {
  const figures = JSON.parse(document.getElementById("figures-data").textContent);
  const pictures = {};
  for (const [name, figure] of Object.entries(figures)) {
    const [data, layout] = moietyThemes.themed(figure, moietyThemes.light);
    layout.paper_bgcolor = "#ffffff";
    layout.title = { text: figure.title, font: { size: 16 }, x: 0.02, xanchor: "left", y: 0.98, yanchor: "top" };
    layout.margin = { ...layout.margin, t: (layout.margin.t || 0) + 36 };
    const size = { format: kind, width: 900, height: layout.height + 36, scale: kind === "png" ? 2 : 1 };
    layout.height = size.height;
    pictures[name] = await Plotly.toImage({ data, layout }, size);
  }
  const place = document.createElement("pre");
  place.id = "pictures";
  place.textContent = JSON.stringify(pictures);
  document.body.replaceChildren(place);
})();
