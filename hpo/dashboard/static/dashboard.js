"use strict";
// The answer as the first card of a study's page: the first part of its note, which optuna-dashboard shows on another.
(() => {
  const EVERY_MS = 1000, RENEWED_EVERY_MS = 30000; // workers renew the note as often

  function render(card, note) {
    const lines = note.split("\n").map((line) => line.replace(/\\(.)/g, "$1")); // the note's text is escaped Markdown
    const end = lines.findIndex((line, index) => index > 0 && line.startsWith("**")); // from there on, captions
    const heading = document.createElement("h2"), list = document.createElement("ul");
    heading.textContent = lines[0].replaceAll("**", "");
    for (const line of lines.slice(1, end < 0 ? undefined : end).filter((text) => text.startsWith("- "))) {
      list.append(Object.assign(document.createElement("li"), {textContent: line.slice(2)}));
    }
    card.replaceChildren(heading, list);
  }

  async function renew(card, study) {
    card.dataset.renewed = Date.now();
    const answer = await fetch(`/api/studies/${study}/note`);
    const note = answer.ok ? await answer.text() : "";
    if (note.startsWith("**")) render(card, note);
  }

  setInterval(() => {
    const study = location.pathname.match(/^\/dashboard\/studies\/(\d+)\/?$/)?.[1];
    const first = document.querySelector('main [id^="user-defined-plot:"]')?.closest("main > div");
    if (!study || !first) return;
    let card = first.querySelector(":scope > .hpo-answer");
    if (card?.dataset.study !== study) {
      card?.remove();
      card = Object.assign(document.createElement("section"), {className: first.querySelector(".MuiCard-root").className});
      card.classList.add("hpo-answer");
      card.dataset.study = study;
      first.prepend(card);
      card.dataset.renewed = 0;
    }
    if (Date.now() - card.dataset.renewed > RENEWED_EVERY_MS) renew(card, study).catch(() => {}); // the store is away
  }, EVERY_MS);
})();
