// Runs in the page, also where the page may run no script itself.

// What a view shows, without its numbers: headings, facts, captions, and the first cell of rows. Times at charts differ
// from one second to the next.
export function rowsOf() {
  const text = (element) => element.textContent.replace(/[▲▼]/g, "").replace(/[0-9][0-9.,]*/g, "#").replace(/\s+/g, " ").trim();
  const all = (selector) => Array.from(document.querySelectorAll(selector)).filter((element) => !element.closest("figure table"));
  const shown = all("main h1, main h2, main dt, main caption, main thead th, main tbody th, main ol li");
  return shown.map((element) => `${element.localName} ${text(element)}`).sort();
}
