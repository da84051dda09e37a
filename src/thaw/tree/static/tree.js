// The tree's one script: unfolding, keys, selecting and comparing; in a server's page also what changed, and actions.
// It puts nothing into the page as markup but what the server or the file has already escaped.
"use strict";
(() => {
  const sessions = document.getElementById("sessions");
  const detail = document.getElementById("detail");
  const status = document.getElementById("status");
  if (!sessions) return;
  const isFile = document.documentElement.dataset.mode === "file";
  const POLL_MS = 2000;
  const LIMIT = 20000;
  // A browser has six connections to one address: the page's other requests need some.
  const FOLLOWED = 4;
  let comparing = null;
  let compared = null;  // of two that stand side by side, the one to go back to
  let asked = 0;
  let wanted = null;  // the point that is shown, or will be
  let selected = null;  // its row
  let picks = 0;
  let clockMs = 0;  // how far the server's clock is ahead of this one

  // What came of an action, or a token's numbers. `kind`: "error" or "done".
  const say = (text, kind) => {
    status.className = kind ?? "";
    status.textContent = text;
  };
  const wrong = (text) => say(text, "error");
  const items = () => [...sessions.querySelectorAll("[role=treeitem]")].filter((item) => item.offsetParent !== null);
  const itemOf = (node) => node.closest("[role=treeitem]");
  const group = (item) => item.querySelector(":scope > [role=group]");
  const make = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  const safely = (handler) => async (event) => {
    try {
      await handler(event);
    } catch (error) {
      if (error.message !== "401") wrong("The gateway did not answer.");
    }
  };

  // -- asking the server

  async function ask(path, options) {
    const answer = await fetch(path, { credentials: "same-origin", ...options });
    const date = Date.parse(answer.headers.get("date") ?? "");
    if (date) clockMs = date - Date.now();
    if (answer.status === 401) {
      wrong("Your session here has ended. Reload the page and enter the key again.");
      throw new Error("401");
    }
    return answer;
  }

  async function fragment(path) {
    const answer = await ask(path);
    return answer.text();
  }

  // Of what takes the place of something: an error must not.
  async function whole(path, options) {
    const answer = await ask(path, options);
    if (!answer.ok) throw new Error(`${answer.status}`);
    return answer.text();
  }

  function parsed(html) {
    const holder = document.createElement("template");
    holder.innerHTML = html;
    return ofTree(holder.content);
  }

  // In the tree arrow keys move, not Tab; without this script Tab does.
  function ofTree(content) {
    for (const link of content.querySelectorAll("[role=treeitem] > .row > a")) link.tabIndex = -1;
    return content;
  }

  // -- the tree

  function focusItem(item) {
    if (!item) return;
    for (const other of sessions.querySelectorAll("[role=treeitem][tabindex='0']")) other.tabIndex = -1;
    item.tabIndex = 0;
    item.focus();
  }

  async function unfold(item) {
    if (!item.hasAttribute("aria-expanded")) return;
    if (!group(item)) {
      if (isFile) { say(item.querySelector(":scope > .left-out")?.textContent ?? ""); return; }
      const rows = await rowsFor(item, `of=${encodeURIComponent(item.dataset.point)}`);
      if (!rows) return;
      const list = make("ul");
      list.setAttribute("role", "group");
      list.append(rows);
      item.append(list);
    }
    item.setAttribute("aria-expanded", "true");
  }

  const asking = new Set();

  // The rows that an item stands for; nothing where they are being asked for already, or are not there any more.
  async function rowsFor(item, query) {
    if (asking.has(item)) return null;
    asking.add(item);
    try {
      const answer = await ask(`/tree/rows?${query}`);
      const rows = parsed(await answer.text());
      if (answer.ok) return rows;
      wrong(rows.textContent);
      return null;
    } finally {
      asking.delete(item);
    }
  }

  const fold = (item) => item.setAttribute("aria-expanded", "false");

  async function more(item) {
    const query = `of=${encodeURIComponent(item.dataset.of)}&from=${encodeURIComponent(item.dataset.start)}`;
    const rows = await rowsFor(item, query);
    if (!rows || !item.isConnected) return;
    const first = rows.firstElementChild;
    item.replaceWith(rows);
    focusItem(first);
  }

  async function onKey(event) {
    const item = event.target.closest && itemOf(event.target);
    if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
    const all = items();
    const at = all.indexOf(item);
    const expanded = item.getAttribute("aria-expanded");
    const moves = {
      ArrowDown: () => focusItem(all[at + 1]),
      ArrowUp: () => focusItem(all[at - 1]),
      Home: () => focusItem(all[0]),
      End: () => focusItem(all[all.length - 1]),
      ArrowRight: async () => {
        if (expanded === "false") await unfold(item);
        else if (expanded === "true") focusItem(group(item)?.querySelector("[role=treeitem]"));
      },
      ArrowLeft: () => {
        if (expanded === "true") fold(item);
        else focusItem(item.parentElement.closest("[role=treeitem]"));
      },
      Enter: () => choose(item),
      " ": () => choose(item),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    await moves[event.key]();
  }

  async function onClick(event) {
    const item = itemOf(event.target);
    const link = event.target.closest("a");
    if (!item) return;
    if (link && (event.ctrlKey || event.metaKey || event.shiftKey || event.button)) return;
    event.preventDefault();
    focusItem(item);
    const row = event.target.closest(".row");
    const onArrow = row && event.clientX - row.getBoundingClientRect().left < 22;
    if (onArrow && item.hasAttribute("aria-expanded")) {
      if (item.getAttribute("aria-expanded") === "true") fold(item); else await unfold(item);
    } else if (row || item.dataset.of !== undefined) await choose(item);
  }

  async function choose(item) {
    if (item.dataset.of !== undefined) return more(item);
    if (!item.dataset.point) return;
    if (comparing && comparing !== item.dataset.point) return compare(comparing, item.dataset.point);
    const before = selected;
    select(item.id);
    const mine = picks;
    try {
      await show(item.dataset.point);
    } catch (error) {
      if (mine === picks) select(before);
      throw error;
    }
  }

  // The row of what is shown, wherever the tree has it by now.
  function select(id) {
    picks += 1;
    selected = id;
    mark();
  }

  function mark() {
    for (const other of sessions.querySelectorAll("[aria-selected=true]")) other.setAttribute("aria-selected", "false");
    document.getElementById(selected ?? "")?.setAttribute("aria-selected", "true");
  }

  // -- one point

  async function show(point) {
    const mine = ++asked;
    const before = wanted;
    wanted = point;
    let content;
    try {
      content = isFile ? fromFile(point) : parsed(await fragment(`/tree/point?at=${encodeURIComponent(point)}`));
    } catch (error) {
      if (mine === asked) wanted = before;
      throw error;
    }
    if (mine !== asked) return;
    compared = null;
    detail.replaceChildren(content);
    detail.dataset.point = point;
    detail.scrollTop = 0;
    beginTokens();
    if (!isFile) history.replaceState(null, "", `/?at=${encodeURIComponent(point)}`);
    if (getComputedStyle(document.querySelector(".back") ?? detail).display !== "none" && innerWidth < 737) {
      detail.scrollIntoView();
    }
    say("");
  }

  function fromFile(point) {
    const holder = document.getElementById(`p-${point}`);
    if (!holder) {
      const said = make("p", "The turns of this session are not in this file. This command shows them: ", "hint");
      said.append(make("code", document.documentElement.dataset.command.replace("POINT", point)));
      return said;
    }
    const content = holder.content.cloneNode(true);
    for (const place of content.querySelectorAll("[data-turn]")) {
      place.replaceWith(document.getElementById(place.dataset.turn).content.cloneNode(true));
    }
    return content;
  }

  // -- two points

  function startComparing(point) {
    comparing = point;
    say("Pick the other session in the tree. Escape ends it.");
    focusItem(sessions.querySelector("[aria-selected=true]") ?? items()[0]);
  }

  function stopComparing() {
    comparing = null;
    say("");
  }

  async function leaveComparison() {
    await show(compared);
    focusItem(document.getElementById(selected ?? ""));
  }

  // -- tokens: the text is one stop of the Tab key, and arrow keys move in it

  const TOKEN = "i[title]";

  function beginTokens() {
    for (const text of detail.querySelectorAll("pre, .strip")) {
      const first = text.querySelector(`:scope > ${TOKEN}`);
      if (first) reachable(first);
    }
  }

  function reachable(token) {
    for (const other of token.parentElement.querySelectorAll("[tabindex]")) {
      other.removeAttribute("tabindex");
      other.removeAttribute("role");
    }
    token.tabIndex = 0;
    token.setAttribute("role", "button");
  }

  function tellToken(token) {
    for (const other of detail.querySelectorAll("i.chosen")) other.classList.remove("chosen");
    token.classList.add("chosen");
    reachable(token);
    say(`${JSON.stringify(token.textContent)}: ${token.title}`);
  }

  function onTokenKey(event) {
    const token = event.target;
    if (!token.matches(TOKEN) || event.altKey || event.ctrlKey || event.metaKey) return;
    const all = token.parentElement.querySelectorAll(`:scope > ${TOKEN}`);
    const to = {
      ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
      Home: all[0], End: all[all.length - 1], Enter: token, " ": token,
    };
    if (!(event.key in to)) return;
    event.preventDefault();
    if (!to[event.key]?.matches(TOKEN)) return;
    tellToken(to[event.key]);
    to[event.key].focus();
  }

  async function compare(a, b) {
    stopComparing();
    const found = isFile ? byText(a, b)
      : parsed(await fragment(`/tree/diff?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`));
    const back = make("p");
    const button = make("button", "Back to the session");
    button.type = "button";
    button.addEventListener("click", safely(() => show(a)));
    back.append(button);
    compared = a;
    detail.replaceChildren(back, found);
    detail.scrollTop = 0;
    if (innerWidth < 737) detail.scrollIntoView();
    detail.querySelector("h2")?.focus();
  }

  function textOf(point) {
    const holder = document.getElementById(`p-${point}`);
    const places = [...holder?.content.querySelectorAll("[data-turn]") ?? []];
    if (!places.length) return null;
    return places.map((place) => {
      const turn = document.getElementById(place.dataset.turn).content;
      return turn.querySelector("pre")?.textContent ?? "";
    }).join("");
  }

  function nameOf(point) {
    return document.getElementById(`p-${point}`)?.content.querySelector("h2")?.textContent ?? point;
  }

  function byText(a, b) {
    const left = textOf(a), right = textOf(b);
    const made = make("section");
    made.append(make("h2", "Compared by text"));
    const exact = make("p", "By tokens, with log probabilities and bytes: ");
    exact.append(make("code", `thaw diff ${a} ${b}`));
    made.append(exact);
    if (left === null || right === null) {
      made.append(make("p", "The turns of one of the two are not in this file.", "warning"));
      return made;
    }
    let same = 0;
    while (same < left.length && same < right.length && left[same] === right[same]) same += 1;
    made.append(make("pre", `… ${left.slice(Math.max(0, same - 120), same)}`, "common"));
    if (same === left.length && same === right.length) {
      made.append(make("p", "The two say the same."));
      return made;
    }
    const sides = make("div", undefined, "sides");
    for (const [point, text] of [[a, left], [b, right]]) {
      const side = make("div", undefined, "side");
      const rest = text.slice(same, same + LIMIT);
      side.append(make("h3", nameOf(point)), make("pre", rest || "(ends here)"));
      sides.append(side);
    }
    made.append(sides);
    return made;
  }

  // -- what is done in the detail

  function onDetailClick(event) {
    const target = event.target;
    const linked = target.closest("a[data-point]");
    if (linked && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
      event.preventDefault();
      return show(linked.dataset.point);
    } else if (target.closest("button.compare")) startComparing(target.dataset.point);
    else if (target.closest("button.fork-here")) forkHere(target.dataset.point);
    else if (target.matches(TOKEN)) tellToken(target);
  }

  function forkHere(point) {
    const form = detail.querySelector("form[action='/tree/fork']");
    if (!form) return;
    form.elements.point.value = point;
    form.closest("details").open = true;
    form.scrollIntoView({ block: "nearest" });
    form.elements.prompt.focus();
  }

  async function onSubmit(event) {
    const form = event.target;
    if (!form.matches("form.action")) return;
    event.preventDefault();
    const button = event.submitter ?? form.querySelector("button");
    button.disabled = true;
    say("Asking the gateway …");
    try {
      const body = new URLSearchParams(new FormData(form, event.submitter));
      const answer = await ask(form.action, { method: "POST", body, headers: { accept: "application/json" } });
      const told = await answer.json();
      if (!answer.ok) {
        // What the panel shows has changed meanwhile.
        if (answer.status === 409) { await refresh(true); await show(detail.dataset.point); }
        wrong(told.error);
        return;
      }
      const before = picks;
      if (told.at) wanted = told.at;
      await refresh(true);
      if (before === picks) {
        if (told.at) await show(told.at); else showNothing(told.said);
      }
      say(told.said, "done");
    } catch (error) {
      if (error.message !== "401") wrong("The gateway did not answer.");
    } finally {
      button.disabled = false;
    }
  }

  function showNothing(said) {
    asked += 1;
    wanted = null;
    select(null);
    delete detail.dataset.point;
    detail.replaceChildren(make("p", `${said} Its session is not in the tree any more. Choose another one.`, "hint"));
    history.replaceState(null, "", "/");
  }

  // -- live

  let version = document.documentElement.dataset.version;

  const following = new Map();

  function follow(entry) {
    const source = new EventSource(`/tree/follow?request=${encodeURIComponent(entry.dataset.request)}`);
    const place = entry.querySelector("pre");
    const text = document.createTextNode("");
    place.replaceChildren(text);
    following.set(entry, source);
    source.addEventListener("message", (event) => {
      text.appendData(JSON.parse(event.data));
      if (text.length > 2 * LIMIT) text.deleteData(0, text.length - LIMIT);
      place.scrollTop = place.scrollHeight;
    });
    source.addEventListener("end", () => { source.close(); refresh(true).catch(() => {}); });
    source.addEventListener("error", () => source.close());
  }

  function onToggle(event) {
    const entry = event.target;
    if (entry.open && !following.has(entry)) {
      const open = [...following.values()].filter((source) => source.readyState !== EventSource.CLOSED);
      if (open.length < FOLLOWED) follow(entry);
      else {
        entry.open = false;
        wrong(`The texts of ${FOLLOWED} requests grow at once; fold one first.`);
      }
    } else if (!entry.open) {
      following.get(entry)?.close();
      following.delete(entry);
      if (entry.classList.contains("over")) entry.remove();
    }
  }

  function markOver(entry) {
    const summary = entry.querySelector("summary");
    const branch = summary.querySelector("b")?.textContent;
    summary.textContent = `${branch ? `${branch} is ` : ""}over; `;
    const link = make(branch ? "a" : "span", "its session is in the tree");
    if (branch) link.href = `/?at=${encodeURIComponent(branch)}`;
    summary.append(link);
    entry.classList.add("over");
  }

  // Somebody reads the unfolded ones: they stay as they are, also when they are over.
  function showRunning(fresh) {
    const place = document.getElementById("running");
    for (const entry of [...place.querySelectorAll("details[open]")].reverse()) {
      const same = fresh.querySelector(`details[data-request="${entry.dataset.request}"]`);
      if (same) {
        entry.querySelector("summary").replaceWith(same.querySelector("summary"));
        same.replaceWith(entry);
      } else {
        if (!entry.classList.contains("over")) markOver(entry);
        fresh.prepend(entry);
      }
    }
    place.replaceWith(fresh);
    fresh.addEventListener("toggle", onToggle, true);
  }

  function unfolded() {
    const open = [];
    for (const list of sessions.querySelectorAll("[role=tree], [aria-expanded=true] > [role=group]")) {
      const of = list.matches("[role=tree]") ? "" : list.parentElement.dataset.point;
      open.push(`${of}:${list.querySelectorAll(":scope > [role=treeitem]:not(.more)").length}`);
    }
    return open.join(",");
  }

  async function refresh(always) {
    const now = await whole("/tree/version");
    if (now === version && !always) { tellAges(); return; }
    const shut = [...sessions.querySelectorAll("[aria-expanded=false]")].map((item) => item.dataset.point).join(",");
    const body = new URLSearchParams({ open: unfolded(), shut, at: wanted ?? "" });
    const before = picks;
    const content = parsed(await whole("/tree/sessions", { method: "POST", body }));
    const focused = document.activeElement && itemOf(document.activeElement)?.id;
    const scroll = sessions.scrollTop;
    sessions.replaceChildren(content.getElementById("tree"));
    document.getElementById("totals").replaceWith(content.getElementById("totals"));
    showRunning(content.getElementById("running"));
    sessions.scrollTop = scroll;
    if (before === picks) selected = sessions.querySelector("[aria-selected=true]")?.id ?? null; else mark();
    tellAges();
    version = now;
    const item = focused && document.getElementById(focused);
    if (item) focusItem(item); else enter();
  }

  const UNITS = [["second", 60, 1], ["minute", 3600, 60], ["hour", 86400, 3600], ["day", 86400 * 60, 86400]];

  // As `thaw.tree.words.age` says it, by the server's clock.
  function tellAges() {
    const now = Date.now() + clockMs;
    for (const place of sessions.querySelectorAll("time")) {
      const seconds = (now - Date.parse(place.dateTime)) / 1000;
      const found = UNITS.find(([, limit]) => seconds < limit);
      if (!found) continue;
      const [unit, , size] = found;
      const number = Math.floor(seconds / size);
      const said = seconds < 1 ? "now" : `${number}\u00a0${unit}${number === 1 ? "" : "s"}\u00a0ago`;
      if (place.textContent !== said) place.textContent = said;
    }
  }

  const AWAY = "The gateway does not answer; trying again.";

  async function poll() {
    if (document.visibilityState === "visible") {
      try {
        await refresh(false);
        if (status.textContent === AWAY) say("");
      } catch (error) {
        if (error.message === "401") return;
        wrong(AWAY);
      }
    }
    setTimeout(poll, POLL_MS);
  }

  function enter() {
    const item = sessions.querySelector("[aria-selected=true]") ?? sessions.querySelector("[role=treeitem]");
    if (item) item.tabIndex = 0;
  }

  sessions.addEventListener("keydown", safely(onKey));
  sessions.addEventListener("click", safely(onClick));
  detail.addEventListener("click", safely(onDetailClick));
  detail.addEventListener("submit", safely(onSubmit));
  ofTree(sessions);
  detail.addEventListener("keydown", onTokenKey);
  document.addEventListener("keydown", safely((event) => {
    if (event.key !== "Escape") return;
    if (comparing) stopComparing();
    else if (compared) return leaveComparison();
    else say("");
  }));
  status.addEventListener("click", () => say(""));
  enter();
  selected = sessions.querySelector("[aria-selected=true]")?.id ?? null;
  const hint = detail.querySelector(":scope > [data-said]");
  if (hint) hint.textContent = hint.dataset.said;
  beginTokens();
  if (!isFile) {
    wanted = new URLSearchParams(location.search).get("at");
    if (wanted) detail.dataset.point = wanted;
    if (new URLSearchParams(location.search).has("with")) compared = wanted;
    document.getElementById("running").addEventListener("toggle", onToggle, true);
    setTimeout(poll, POLL_MS);
  }
})();
