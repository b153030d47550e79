// Works a view by keyboard alone, and says what is not possible.

// Everything that Tab must reach.
const STOPS = "a[href], button, input, select, textarea, summary, [tabindex]";
// More presses of Tab than a view of the test has stops.
const MOST = 600;

export class Keyboard {
  constructor(page, complain) {
    this.page = page;
    this.complain = complain;
  }

  press(key) {
    return this.page.keyboard.press(key);
  }

  // The first stop leads past the navigation, and Tab goes on from there.
  async skips() {
    await this.press("Tab");
    const first = await this.page.evaluate(() => {
      const at = document.activeElement;
      const box = at.getBoundingClientRect();
      return { skip: at.classList.contains("skip"), visible: box.left >= 0 && box.top >= 0 && box.width > 0 };
    });
    if (!first.skip || !first.visible) this.complain("the first stop is not a visible link to the content");
    await this.press("Enter");
    const arrived = () => document.activeElement?.id === "main";
    await this.page.waitForFunction(arrived, undefined, { timeout: 15_000 }).catch(() => {
      this.complain("the link to the content does not lead there");
    });
    await this.press("Tab");
    const inside = await this.page.evaluate(() => {
      const at = document.activeElement;
      const main = document.getElementById("main");
      return main.contains(at) || !main.querySelector("a[href], button, input, select, summary, [tabindex='0']");
    });
    if (!inside) this.complain("behind the link to the content, Tab does not go on in the content");
  }

  // Where the keyboard is: the number of the stop, and whether a reader sees it. Null: outside the document.
  at() {
    return this.page.evaluate((selector) => {
      const at = document.activeElement;
      if (!at || at === document.body || at === document.documentElement) return null;
      const style = getComputedStyle(at);
      const box = at.getBoundingClientRect();
      const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
      const inView = box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth;
      return {
        number: Array.from(document.querySelectorAll(selector)).indexOf(at),
        name: at.getAttribute("aria-label") ?? at.textContent.trim().slice(0, 40),
        tag: at.localName,
        id: at.id,
        visible: at.matches(":focus-visible") && ring && inView && box.width > 0 && box.height > 0,
      };
    }, STOPS);
  }

  // Goes once through the document, to stop the updates and to open every table; and once more to see every stop.
  // Returns their number.
  async walks() {
    let last = null;
    for (let presses = 0; presses < MOST; presses += 1) {
      await this.press("Tab");
      const at = await this.at();
      if (!at || (at.number === 0 && last !== null && presses > 1)) break;
      if (at.id === "pause" || at.tag === "summary") await this.press("Enter");
      last = at.number;
    }
    const closed = await this.page.evaluate(() => {
      const pause = document.getElementById("pause");
      return {
        tables: document.querySelectorAll("details:not([open])").length,
        running: pause?.hidden === false && pause.textContent === "Pause updates",
        claimed: pause?.hidden === false && !document.getElementById("live").firstElementChild,
      };
    });
    if (closed.tables > 0) this.complain(`${closed.tables} tables do not open by keyboard`);
    if (closed.claimed) this.complain("there are updates to pause, and nothing that is updated");
    if (closed.running) this.complain("the updates cannot be stopped by keyboard");

    const wanted = await this.page.evaluate((selector) => {
      const stops = Array.from(document.querySelectorAll(selector));
      const reachable = (stop) => stop.tabIndex >= 0 && !stop.disabled && stop.checkVisibility({ visibilityProperty: true });
      return stops.flatMap((stop, number) => (reachable(stop) ? [[number, stop.outerHTML.slice(0, 120)]] : []));
    }, STOPS);
    const missing = new Map(wanted);
    const order = [];
    for (let presses = 0; presses < MOST && missing.size > 0; presses += 1) {
      await this.press("Tab");
      const at = await this.at();
      if (!at) continue;
      // Chromium also stops at areas that scroll.
      if (at.number >= 0 && !missing.delete(at.number)) {
        if (order.includes(at.number) && order.length > wanted.length) break;
      }
      if (at.number >= 0) order.push(at.number);
      if (!at.visible) this.complain(`the focus cannot be seen at ${at.tag} ${JSON.stringify(at.name)}`);
    }
    for (const html of missing.values()) this.complain(`Tab does not reach ${html}`);
    // From the first stop on, in the order of the document.
    const start = order.indexOf(Math.min(...order));
    const round = [...order.slice(start), ...order.slice(0, start)];
    const back = round.findIndex((number, place) => place > 0 && number < round[place - 1] && number !== round[0]);
    if (back > 0 && missing.size === 0) this.complain(`Tab goes back from stop ${round[back - 1]} to ${round[back]}`);
    return wanted.length;
  }

  // Goes to an element by Tab alone.
  async reaches(selector) {
    for (let presses = 0; presses < MOST; presses += 1) {
      await this.press("Tab");
      if (!(await this.page.evaluate((wanted) => document.activeElement?.matches(wanted), selector))) continue;
      if (!(await this.at()).visible) this.complain(`the focus cannot be seen at ${selector}`);
      return;
    }
    this.complain(`Tab does not reach ${selector}`);
  }

  // The first table that can be sorted, by a column of numbers where there is one, in both directions.
  async sorts() {
    const column = await this.page.evaluate(() => {
      const tables = Array.from(document.querySelectorAll("#live table")).filter((table) => table.checkVisibility());
      const table = tables.find((one) => one.tBodies[0]?.rows.length > 1) ?? tables[0];
      if (!table) return null;
      const heads = Array.from(table.tHead.rows[0].cells);
      const chosen = Math.max(heads.findIndex((head) => head.classList.contains("number")), 0);
      const button = heads[chosen].querySelector("button");
      button?.focus();
      return button ? { id: button.id, text: button.textContent } : { id: "", text: heads[chosen].textContent };
    });
    if (!column) return;
    if (!column.id) return this.complain(`column ${column.text} cannot be sorted`);
    const seen = [];
    for (const key of ["Enter", "Space"]) {
      await this.press(key);
      const state = await this.page.evaluate((id) => {
        const button = document.getElementById(id);
        const head = button.closest("th");
        const rows = Array.from(head.closest("table").tBodies[0].rows);
        const values = rows.map((row) => row.cells[head.cellIndex]).map((cell) => cell.dataset.v ?? cell.textContent.trim());
        const isNumber = (value) => value !== "" && !Number.isNaN(Number(value));
        const step = (a, b) => (isNumber(a) && isNumber(b) ? Math.sign(a - b) : isNumber(a) === isNumber(b) ? (a < b ? -1 : a > b ? 1 : 0) : isNumber(a) ? 1 : -1);
        const steps = values.slice(1).map((value, at) => step(values[at], value));
        return {
          sort: head.getAttribute("aria-sort"),
          up: steps.every((one) => one <= 0),
          down: steps.every((one) => one >= 0),
          focused: document.activeElement === button,
        };
      }, column.id);
      const right = state.sort === "ascending" ? state.up : state.sort === "descending" && state.down;
      if (!right) this.complain(`${key} at column ${column.text} says ${state.sort}, but the rows are not in that order`);
      if (!state.focused) this.complain(`the focus is lost when column ${column.text} is sorted`);
      seen.push(state.sort);
    }
    if (seen[0] === seen[1]) this.complain(`column ${column.text} is sorted in one direction only`);
  }

  // Narrows the ranking while somebody types, says how many are left, and asks the server by Enter.
  async filters(name) {
    const rows = () =>
      this.page.evaluate(() => {
        const shown = Array.from(document.querySelectorAll(".ranking tbody tr")).filter((row) => !row.hidden);
        const said = document.querySelector("[role='status']")?.textContent ?? "";
        return { names: shown.map((row) => row.cells[1].textContent), said };
      });
    const before = await rows();
    await this.page.locator("#name").focus();
    await this.page.keyboard.type(name);
    const typed = await rows();
    if (typed.names.length === 0 || typed.names.length >= before.names.length) {
      this.complain(`typing ${name} leaves ${typed.names.length} of ${before.names.length} rows`);
    }
    if (!typed.names.every((one) => one.includes(name))) this.complain(`typing ${name} leaves ${typed.names.join(", ")}`);
    if (!typed.said.startsWith(`${typed.names.length} of `)) this.complain(`after typing, the status says ${JSON.stringify(typed.said)}`);
    await Promise.all([this.page.waitForURL((url) => url.searchParams.get("name") === name), this.press("Enter")]);
    const sent = await rows();
    if (sent.names.length === 0 || !sent.names.every((one) => one.includes(name))) {
      this.complain(`the form shows ${sent.names.length} rows: ${sent.names.slice(0, 5).join(", ")}`);
    }
    const window = await this.page.locator("#window").inputValue();
    if (window !== "10m") this.complain(`the form has changed the window to ${window}`);
  }

  // An update changes neither where the keyboard is nor the order of the rows.
  async stays() {
    const before = await this.page.evaluate(() => {
      const button = Array.from(document.querySelectorAll(".ranking thead button")).find((one) => one.textContent === "Name");
      button.click();
      const link = document.querySelector(".ranking tbody th a");
      link.focus();
      globalThis.old = link;
      return link.getAttribute("href");
    });
    await this.page.waitForFunction(() => !globalThis.old.isConnected, undefined, { timeout: 60_000 });
    const after = await this.page.evaluate(() => ({
      href: document.activeElement.getAttribute("href"),
      sort: document.querySelector(".ranking th[aria-sort]")?.textContent,
      said: document.getElementById("updated").textContent,
    }));
    if (after.href !== before) this.complain(`an update moves the focus from ${before} to ${after.href}`);
    if (after.sort !== "Name") this.complain("an update forgets how the table was sorted");
    if (!after.said.startsWith("Updated ")) this.complain(`after an update, the page says ${JSON.stringify(after.said)}`);
  }
}
