// What a script adds to a page that works without it: loads the part that changes every ten seconds, sorts tables by
// the column whose heading is pressed, and filters the ranking while somebody types.
"use strict";

const EVERY = 10000;
const live = document.getElementById("live");
const pause = document.getElementById("pause");
const updated = document.getElementById("updated");
const filter = document.querySelector("[data-filter]");
const matching = document.getElementById("matching");
// Columns by the caption's table, so that a new copy is sorted as the old one was.
const sorted = new Map();
let paused = false;
let loading = false;

function value(cell) {
  if (!cell) return "";
  const text = cell.dataset.v ?? cell.textContent.trim();
  const number = Number(text);
  return text !== "" && !Number.isNaN(number) ? number : text;
}

function compare(a, b) {
  const numbers = typeof a === "number" && typeof b === "number";
  if (numbers) return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? 1 : -1;
  return a < b ? -1 : a > b ? 1 : 0;
}

function sort(table, column, descending) {
  const body = table.tBodies[0];
  const keyed = Array.from(body.rows, (row) => [value(row.cells[column]), row]);
  keyed.sort((a, b) => (descending ? compare(b[0], a[0]) : compare(a[0], b[0])));
  body.append(...keyed.map((pair) => pair[1]));
  Array.from(table.tHead.rows[0].cells).forEach((head, at) => {
    if (at === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function makeSortable() {
  Array.from(live.querySelectorAll("table")).forEach((table, number) => {
    if (!table.tHead || !table.tBodies[0]) return;
    Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.id = `sort-${number}-${column}`;
      button.append(...head.childNodes);
      button.addEventListener("click", () => {
        // A column of numbers is interesting from its large end.
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const other = first === "descending" ? "ascending" : "descending";
        const descending = (head.getAttribute("aria-sort") === first ? other : first) === "descending";
        sorted.set(number, [column, descending]);
        sort(table, column, descending);
      });
      head.append(button);
    });
    const choice = sorted.get(number);
    if (choice) sort(table, choice[0], choice[1]);
  });
}

function narrow() {
  if (!filter) return;
  const wanted = filter.value;
  const rows = live.querySelectorAll(".ranking tbody tr");
  let shown = 0;
  for (const row of rows) {
    row.hidden = !row.cells[1].textContent.includes(wanted);
    if (!row.hidden) shown += 1;
  }
  // A status is read out when it changes, so the same text is not written again with every update.
  const text = wanted ? `${shown} of ${rows.length} shown` : "";
  if (matching && matching.textContent !== text) matching.textContent = text;
}

// Where the keyboard is, in words that hold for the next copy too.
function focused() {
  const at = document.activeElement;
  if (!at || !live.contains(at)) return null;
  if (at.id) return () => document.getElementById(at.id);
  const href = at.getAttribute("href");
  if (href) return () => Array.from(live.querySelectorAll("a")).find((a) => a.getAttribute("href") === href);
  if (at.tagName === "SUMMARY") {
    const id = at.parentElement.id;
    return () => document.getElementById(id)?.querySelector("summary");
  }
  const label = at.getAttribute("aria-label");
  return () => Array.from(live.querySelectorAll("[tabindex]")).find((e) => e.getAttribute("aria-label") === label);
}

function selecting() {
  const selection = document.getSelection();
  return selection && !selection.isCollapsed && live.contains(selection.anchorNode);
}

async function load() {
  if (paused || loading || document.hidden || selecting()) return;
  loading = true;
  try {
    const answer = await fetch(location.href, { credentials: "same-origin", cache: "no-store" });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const next = page.getElementById("live");
    if (!answer.ok || !next) throw new Error(`${answer.status}`);
    const open = Array.from(live.querySelectorAll("details[open]"), (details) => details.id);
    const scrolls = Array.from(live.querySelectorAll(".scroll"), (area) => area.scrollLeft);
    const find = focused();
    live.replaceChildren(...next.childNodes);
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    makeSortable();
    narrow();
    live.querySelectorAll(".scroll").forEach((area, at) => { area.scrollLeft = scrolls[at] ?? 0; });
    find?.()?.focus({ preventScroll: true });
    updated.textContent = `Updated ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    // The numbers on the page stay, and say how old they are.
    updated.textContent = `No answer (${error.message}); press Refresh`;
  } finally {
    loading = false;
  }
}

// An action is asked for once. A page that the browser shows again, by its button Back, asks again.
const asking = document.getElementById("confirm");
asking?.form.addEventListener("submit", () => { asking.disabled = true; });
addEventListener("pageshow", () => { if (asking) asking.disabled = false; });

// A page that asks whether an action is meant has nothing that changes: its numbers are those that the form sends.
if (live && pause && live.childElementCount > 0) {
  makeSortable();
  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.textContent = paused ? "Resume updates" : "Pause updates";
    if (!paused) load();
  });
  filter?.addEventListener("input", narrow);
  setInterval(load, EVERY);
}
