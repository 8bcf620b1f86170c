// Finds what a reader cannot read on the page as it is laid out now: text that is cut off, that sticks out of its box,
// or that lies over other text, and pictures that do not load. -> [{kind, text, where, detail}]
(() => {
  const SLACK = 1.5; // pixels: fractions of a pixel are rounded differently from box to box
  const IGNORED = new Set(["SCRIPT", "STYLE", "NOSCRIPT", "OPTION", "TEXTAREA", "TITLE", "DESC", "TEMPLATE"]);
  const page = document.documentElement.clientWidth;

  // Boxes that are laid out only when they come into view would be measured by their estimated size.
  for (const element of document.querySelectorAll("*")) {
    if (getComputedStyle(element).contentVisibility === "auto") element.style.contentVisibility = "visible";
  }

  const short = (text) => text.trim().replace(/\s+/g, " ").slice(0, 60);
  function where(element) {
    const names = [];
    for (let at = element; at && at !== document.body && names.length < 4; at = at.parentElement) {
      const classes = [...at.classList].map((name) => "." + name).join("");
      names.unshift(at.tagName.toLowerCase() + (at.id ? "#" + at.id : "") + classes);
    }
    return names.join(" > ");
  }

  const cache = new Map();
  function about(element) {
    if (cache.has(element)) return cache.get(element);
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    const found = {
      box,
      x: style.overflowX,
      y: style.overflowY,
      isLayer: style.position === "fixed" || style.position === "sticky",
      isFixed: style.position === "fixed",
      isInline: style.display === "inline",
      isContents: style.display === "contents",
      // Text for screen readers alone.
      isUnseen: style.clipPath.startsWith("inset(50%") || /^rect\(([01]px,? ?){4}\)$/.test(style.clip) ||
        (box.width <= 1 && box.height <= 1 && style.overflowX !== "visible"),
    };
    cache.set(element, found);
    return found;
  }

  const cuts = (overflow) => overflow === "hidden" || overflow === "clip";
  const scrolls = (overflow) => overflow === "auto" || overflow === "scroll";
  const findings = [];
  const boxes = [];
  const report = (kind, text, element, detail) =>
    findings.push({ kind, text: short(text), where: where(element), detail: detail || "" });

  // The part of `box` that is seen through the element's ancestors, null where nothing is; reports what is cut off.
  function seen(box, node, element) {
    let { left, right, top, bottom } = box;
    let layer = null, isFixed = false, isReported = false;
    for (let at = element; at && at !== document.documentElement; at = at.parentElement) {
      const { box: outer, x, y, isLayer, isFixed: fixed, isUnseen } = about(at);
      if (isUnseen) return null;
      if (at !== document.body) {
        if (scrolls(x)) { left = Math.max(left, outer.left); right = Math.min(right, outer.right); }
        if (scrolls(y)) { top = Math.max(top, outer.top); bottom = Math.min(bottom, outer.bottom); }
        if (right <= left || bottom <= top) return null;
        const isCutX = cuts(x) && (left < outer.left - SLACK || right > outer.right + SLACK);
        // The box of a line is higher than its letters.
        const high = 0.2 * (bottom - top);
        const isCutY = cuts(y) && (top + high < outer.top - SLACK || bottom - high > outer.bottom + SLACK);
        if ((isCutX || isCutY) && !isReported) {
          report("cut off", node.data, element, "by " + where(at));
          isReported = true;
        }
      }
      if (isLayer && !layer) layer = at;
      isFixed = isFixed || fixed;
      if (fixed) break;
    }
    const isOutside = right <= 0 || (isFixed && (left >= page || bottom <= 0 || top >= innerHeight));
    if (isOutside) return null; // a drawer that waits beside the page
    if (!isReported && (left < -SLACK || right > page + SLACK)) {
      report("outside the page", node.data, element, `from ${Math.round(left)} to ${Math.round(right)} of ${page}`);
    }
    return { left, right, top, bottom, layer };
  }

  function block(element) {
    const svg = element.closest("svg");
    let at = svg ? svg.parentElement : element;
    while (at && (about(at).isInline || about(at).isContents)) at = at.parentElement;
    return at;
  }

  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || IGNORED.has(element.tagName.toUpperCase())) continue;
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const holder = block(element);
    let isOut = false;
    for (const box of range.getClientRects()) {
      if (box.width < 1 || box.height < 1) continue;
      const part = seen(box, node, element);
      if (!part) continue;
      const { box: outer, x } = about(holder);
      if (!isOut && !scrolls(x) && !cuts(x) && (box.left < outer.left - SLACK || box.right > outer.right + SLACK)) {
        const far = Math.round(Math.max(outer.left - box.left, box.right - outer.right));
        report("sticks out", node.data, element, `by ${far} px of ${where(holder)}`);
        isOut = true;
      }
      const high = 0.18 * (part.bottom - part.top);
      const letters = { left: part.left + 1, right: part.right - 1, top: part.top + high, bottom: part.bottom - high };
      boxes.push({ ...letters, layer: part.layer, node, element });
    }
  }

  boxes.sort((one, other) => one.top - other.top);
  const met = new Set();
  let open = [];
  for (const box of boxes) {
    open = open.filter((other) => other.bottom > box.top);
    for (const other of open) {
      if (other.node === box.node || other.layer !== box.layer || met.has(box.node)) continue;
      if (Math.min(box.right, other.right) - Math.max(box.left, other.left) > 0) {
        met.add(box.node);
        const under = `over "${short(other.node.data)}" in ${where(other.element)}`;
        report("over other text", box.node.data, box.element, under);
      }
    }
    open.push(box);
  }

  for (const picture of document.images) {
    if (picture.complete && picture.naturalWidth === 0 && picture.loading !== "lazy") {
      report("picture does not load", picture.alt, picture, picture.src.slice(0, 80));
    }
  }
  return findings;
})()
