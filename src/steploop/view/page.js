"use strict";
// Hover or click a card and its source lines light up; hover or click a line and its cards do. A click holds.
(() => {
  const all = (root, selector) => [...root.querySelectorAll(selector)];
  const places = (element) => (element.dataset.at || "").split(" ").filter(Boolean);

  for (const plan of all(document, ".plan")) {
    const cards = all(plan, ".card"), lines = all(plan, ".ln[data-at]");
    let pinned = null;

    const light = (chosen) => {
      plan.classList.toggle("dim", chosen !== null);
      const near = chosen === null ? [] : places(chosen);
      for (const card of cards) {
        const hot = card === chosen || (chosen?.matches(".ln") && places(card).includes(near[0]));
        card.classList.toggle("hot", Boolean(hot));
      }
      for (const line of lines) {
        const at = places(line)[0];
        const innermost = chosen !== null && at === near[0];
        line.classList.toggle("hot", line === chosen || innermost);
        line.classList.toggle("warm", !innermost && near.includes(at));
      }
    };
    const pin = (chosen) => {
      pinned = pinned === chosen ? null : chosen;
      for (const element of [...cards, ...lines]) {
        const on = element === pinned;
        element.classList.toggle("pinned", on);
        element.setAttribute("aria-pressed", String(on));
      }
      light(pinned);
      if (pinned) bring(pinned);
    };
    // Shows the other side of what was chosen, where it is out of sight.
    const bring = (chosen) => {
      const other = chosen.matches(".ln") ? cards : lines;
      const first = other.find((element) => element.classList.contains("hot"));
      first?.closest("details")?.setAttribute("open", "");
      first?.scrollIntoView({ block: "nearest", inline: "nearest" });
    };
    for (const element of [...cards, ...lines]) {
      element.addEventListener("mouseenter", () => pinned || light(element));
      element.addEventListener("mouseleave", () => pinned || light(null));
      element.addEventListener("focus", () => pinned || light(element));
      element.addEventListener("click", (event) => {
        if (!event.target.closest("summary") && !getSelection()?.toString()) pin(element);
      });
      element.addEventListener("keydown", (event) => {
        if (event.target === element && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); pin(element); }
      });
    }
    document.addEventListener("keydown", (event) => { if (event.key === "Escape" && pinned) pin(pinned); });
  }

  const tabs = all(document, ".tabs button");
  const show = (name) => {
    for (const tab of tabs) tab.setAttribute("aria-selected", String(tab.dataset.shows === name));
    for (const plan of all(document, ".plan")) plan.hidden = plan.id !== name;
  };
  for (const tab of tabs) tab.addEventListener("click", () => show(tab.dataset.shows));
  if (tabs.some((tab) => "#" + tab.dataset.shows === location.hash)) show(location.hash.slice(1));

  document.querySelector(".theme")?.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
})();
