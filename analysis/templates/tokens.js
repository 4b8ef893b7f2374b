"use strict";
(() => {
  const view = JSON.parse(document.getElementById("view-data").textContent);
  const find = (id) => document.getElementById(id);
  const [domainBox, documentBox, layerBox] = [find("domain"), find("document"), find("layer")];
  const [text, detail, legend] = [find("text"), find("detail"), find("legend")];
  const other = "#8A8A8A";
  const [blockTokens, margin] = [400, 900];
  const state = { current: null, blocks: [], focused: 0, only: null };

  function element(name, className, content) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (content !== undefined) node.textContent = content;
    return node;
  }

  function bytes(packed) {
    const text = atob(packed);
    const raw = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) raw[at] = text.charCodeAt(at);
    return raw;
  }

  function unpack(entry) {
    if (entry.unpacked) return entry.unpacked;
    const raw = bytes(entry.experts);
    const experts = view.expertBytes === 1 ? raw : new Uint16Array(raw.buffer);
    const decoded = new Set(entry.decoded);
    entry.unpacked = { experts, decoded, weights: bytes(entry.weights), entropy: bytes(entry.entropy) };
    return entry.unpacked;
  }

  /* The experts of one token in one layer, heaviest first; layer -1 is the mean over layers. */
  function routes(entry, token, layer) {
    const { experts, weights } = unpack(entry);
    const totals = new Map();
    const layers = layer < 0 ? [...Array(view.layers).keys()] : [layer];
    for (const l of layers) {
      const start = (token * view.layers + l) * view.active;
      for (let rank = 0; rank < view.active; rank++) {
        const expert = experts[start + rank];
        const weight = weights[start + rank] / 255 / layers.length;
        totals.set(expert, (totals.get(expert) || 0) + weight);
      }
    }
    return [...totals].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  }

  function entropy(entry, token, layer) {
    const values = unpack(entry).entropy;
    const layers = layer < 0 ? [...Array(view.layers).keys()] : [layer];
    const sum = layers.reduce((total, l) => total + values[token * view.layers + l], 0);
    return ((sum / layers.length) * Math.log(view.experts.length)) / 255;
  }

  const percent = (share) => `${Math.round(100 * share)}%`;
  const chosenLayer = () => Number(layerBox.value);

  function shownText(piece) {
    if (piece === "") return "·";
    return piece.replaceAll("\t", "⇥\t").replaceAll("\n", "↵\n");
  }

  function tint(colour, weight) {
    const channel = (at) => parseInt(colour.slice(at, at + 2), 16);
    return `rgba(${channel(1)},${channel(3)},${channel(5)},${(0.06 + 0.44 * weight).toFixed(3)})`;
  }

  /* Where the blocks of a document begin: at its windows, and in long ones after a line's end. */
  function cuts(entry) {
    const starts = new Set([0, ...entry.windows]);
    const found = [];
    let last = 0;
    for (let token = 0; token < entry.tokens.length; token++) {
      const full = token - last >= blockTokens && (entry.tokens[token - 1].endsWith("\n") || token - last >= 2 * blockTokens);
      if (starts.has(token) || full) {
        found.push({ first: token, window: starts.has(token) });
        last = token;
      }
    }
    return found;
  }

  function paintToken(node) {
    const token = Number(node.dataset.token);
    const found = routes(state.current, token, chosenLayer());
    const [expert, weight] = found[0];
    const colour = view.colours[expert];
    node.style.backgroundColor = tint(colour, weight);
    node.style.borderBottomColor = colour;
    node.style.borderBottomStyle = ["solid", "dashed", "dotted", "double"][expert % 4];
    node.classList.toggle("dim", state.only !== null && state.only !== expert);
    const heard = found.slice(0, 3).map(([e, w]) => `${view.experts[e]} ${percent(w)}`).join(", ");
    node.setAttribute("aria-label", `${shownText(state.current.tokens[token]).trim() || "space"}: ${heard}`);
  }

  function paint() {
    for (const block of state.blocks) if (block.filled) block.node.querySelectorAll(".token").forEach(paintToken);
    show(state.focused);
  }

  function fill(block) {
    if (block.filled) return;
    block.filled = true;
    const nodes = [];
    for (let token = block.first; token < block.stop; token++) {
      const piece = state.current.tokens[token];
      const node = element("span", piece === "" ? "token empty" : "token", shownText(piece));
      node.setAttribute("role", "option");
      node.setAttribute("aria-selected", String(token === state.focused));
      node.setAttribute("aria-posinset", String(token + 1));
      node.setAttribute("aria-setsize", String(state.current.tokens.length));
      node.dataset.token = String(token);
      node.tabIndex = token === state.focused ? 0 : -1;
      paintToken(node);
      nodes.push(node);
    }
    block.node.replaceChildren(...nodes);
    block.node.style.height = "";
  }

  /* Only blocks near the window of text have their tokens in the page; others keep their height. */
  function empty(block) {
    if (!block.filled || (state.focused >= block.first && state.focused < block.stop)) return;
    block.node.style.height = `${block.node.offsetHeight}px`;
    block.filled = false;
    block.node.replaceChildren();
  }

  function settle() {
    const [top, bottom] = [text.scrollTop - margin, text.scrollTop + text.clientHeight + margin];
    const near = state.blocks.map(({ node }) => node.offsetTop + node.offsetHeight >= top && node.offsetTop <= bottom);
    state.blocks.forEach((block, at) => (near[at] ? fill(block) : empty(block)));
  }

  function read() {
    const chosen = view.documents[Number(documentBox.value)];
    const found = cuts(chosen);
    [state.current, state.focused] = [chosen, 0];
    state.blocks = found.map((cut, index) => {
      const node = element("div", cut.window ? "window" : "window same");
      node.setAttribute("role", "presentation");
      const stop = index + 1 < found.length ? found[index + 1].first : chosen.tokens.length;
      node.style.height = `${Math.ceil((stop - cut.first) / 14) * 2.05}em`;
      return { node, first: cut.first, stop, filled: false };
    });
    text.replaceChildren(...state.blocks.map((block) => block.node));
    text.setAttribute("aria-label", `Tokens of ${documentBox.selectedOptions[0].text}`);
    text.scrollTop = 0;
    settle();
    show(0);
  }

  function nodeOf(token) {
    const block = state.blocks.find((one) => token < one.stop);
    fill(block);
    return block.node.children[token - block.first];
  }

  function select(token, focus) {
    const clamped = Math.max(0, Math.min(state.current.tokens.length - 1, token));
    const before = text.querySelector('[aria-selected="true"]');
    if (before) {
      before.tabIndex = -1;
      before.setAttribute("aria-selected", "false");
    }
    const node = nodeOf(clamped);
    node.tabIndex = 0;
    node.setAttribute("aria-selected", "true");
    state.focused = clamped;
    if (!focus) return;
    node.focus();
    settle();
  }

  /* The next token, forwards or backwards, whose first expert is the chosen one. */
  function jump(by) {
    if (state.only === null) return;
    for (let token = state.focused + by; token >= 0 && token < state.current.tokens.length; token += by) {
      if (routes(state.current, token, chosenLayer())[0][0] === state.only) {
        select(token, true);
        return;
      }
    }
  }

  function bar(expert, weight) {
    const row = element("div", "route");
    const meter = row.appendChild(element("span", "meter"));
    const fill = meter.appendChild(element("span", "fill"));
    fill.style.width = `${100 * weight}%`;
    fill.style.backgroundColor = view.colours[expert];
    row.append(element("span", "name", view.experts[expert]), element("span", "share", percent(weight)));
    return row;
  }

  function show(token) {
    const chosen = state.current;
    const loss = chosen.loss[token];
    const layer = chosenLayer();
    const piece = chosen.tokens[token];
    const title = element("p", "piece", piece === "" ? "no text of its own" : shownText(piece).trim() || "space");
    const facts = element("p", "facts",
      `token ${token}, id ${chosen.ids[token]} · ${unpack(chosen).decoded.has(token) ? "decode" : "prefill"} · ` +
      `${loss === null ? "no loss known" : `loss ${loss.toFixed(2)} nats`} · ` +
      `gate entropy ${entropy(chosen, token, layer).toFixed(2)} nats`);
    const parts = [title, facts, element("h3", "", layer < 0 ? "Mean over layers" : `Layer ${layer}`)];
    routes(chosen, token, layer).slice(0, 8).forEach(([e, w]) => parts.push(bar(e, w)));
    if (layer < 0 && view.layers > 1) parts.push(element("h3", "", "First in each layer"), strip(chosen, token));
    detail.replaceChildren(...parts);
  }

  function strip(chosen, token) {
    const list = element("ol", "strip");
    for (let layer = 0; layer < view.layers; layer++) {
      const [expert, weight] = routes(chosen, token, layer)[0];
      const item = list.appendChild(element("li", "", String(layer)));
      item.style.backgroundColor = tint(view.colours[expert], weight);
      item.style.borderBottomColor = view.colours[expert];
      item.title = `layer ${layer}: ${view.experts[expert]} ${percent(weight)}`;
      item.setAttribute("aria-label", item.title);
    }
    return list;
  }

  function listDocuments() {
    const domain = Number(domainBox.value);
    documentBox.replaceChildren();
    view.documents.forEach((entry, index) => {
      if (domain >= 0 && entry.domain !== domain) return;
      const name = `${view.domains[entry.domain]}, document ${entry.id} (${entry.tokens.length} tokens)`;
      documentBox.add(new Option(name, String(index)));
    });
    read();
  }

  function step(box, by) {
    const at = box.selectedIndex + by;
    if (at < 0 || at >= box.options.length) return false;
    box.selectedIndex = at;
    return true;
  }

  function turn(by, focus) {
    if (!step(documentBox, by)) return;
    read();
    if (focus) select(0, true);
  }

  function relayer(by) {
    if (step(layerBox, by)) paint();
  }

  function drawLegend() {
    view.experts.forEach((name, expert) => {
      if (view.colours[expert] === other) return;
      const button = element("button", "swatch", name);
      button.type = "button";
      button.style.borderBottomColor = view.colours[expert];
      button.style.backgroundColor = tint(view.colours[expert], 1);
      button.style.borderBottomStyle = ["solid", "dashed", "dotted", "double"][expert % 4];
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        state.only = state.only === expert ? null : expert;
        legend.querySelectorAll("button").forEach((node) => node.setAttribute("aria-pressed", "false"));
        button.setAttribute("aria-pressed", String(state.only === expert));
        paint();
      });
      legend.appendChild(element("li")).append(button);
    });
    const rest = view.colours.filter((colour) => colour === other).length;
    if (rest) legend.appendChild(element("li", "rest", `grey: ${rest} other experts`));
  }

  const keys = {
    ArrowRight: () => select(state.focused + 1, true),
    ArrowLeft: () => select(state.focused - 1, true),
    ArrowDown: () => turn(1, true),
    ArrowUp: () => turn(-1, true),
    Home: () => select(0, true),
    End: () => select(state.current.tokens.length - 1, true),
    PageDown: () => select(state.focused + blockTokens, true),
    PageUp: () => select(state.focused - blockTokens, true),
    n: () => jump(1),
    p: () => jump(-1),
    "[": () => relayer(-1),
    "]": () => relayer(1),
  };
  const tokenOf = (event) => event.target.closest(".token")?.dataset.token;

  text.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  text.addEventListener("scroll", () => requestAnimationFrame(settle));
  window.addEventListener("resize", () => requestAnimationFrame(settle));
  text.addEventListener("focusin", (event) => tokenOf(event) && show(Number(tokenOf(event))));
  text.addEventListener("click", (event) => tokenOf(event) && select(Number(tokenOf(event)), true));
  text.addEventListener("mouseover", (event) => tokenOf(event) && show(Number(tokenOf(event))));
  text.addEventListener("mouseleave", () => show(state.focused));
  domainBox.addEventListener("change", listDocuments);
  documentBox.addEventListener("change", read);
  layerBox.addEventListener("change", paint);
  find("previous").addEventListener("click", () => turn(-1, false));
  find("next").addEventListener("click", () => turn(1, false));

  domainBox.add(new Option("all", "-1"));
  view.domains.forEach((name, index) => domainBox.add(new Option(name, String(index))));
  window.addEventListener("beforeprint", () => state.blocks.slice(0, 4).forEach(fill));
  layerBox.add(new Option("mean over layers", "-1"));
  for (let layer = 0; layer < view.layers; layer++) layerBox.add(new Option(String(layer), String(layer)));
  drawLegend();
  listDocuments();
})();
