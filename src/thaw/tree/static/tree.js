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
  let asked = 0;

  const say = (text) => { status.textContent = text; };
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
      if (error.message !== "401") say("The gateway did not answer.");
    }
  };

  // -- asking the server

  async function ask(path, options) {
    const answer = await fetch(path, { credentials: "same-origin", ...options });
    if (answer.status === 401) {
      say("Your session here has ended. Reload the page and enter the key again.");
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
      say(rows.textContent);
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
      Escape: () => stopComparing(),
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
    for (const other of sessions.querySelectorAll("[aria-selected=true]")) other.setAttribute("aria-selected", "false");
    item.setAttribute("aria-selected", "true");
    await show(item.dataset.point);
  }

  // -- one point

  async function show(point) {
    const mine = ++asked;
    const content = isFile ? fromFile(point) : parsed(await fragment(`/tree/point?at=${encodeURIComponent(point)}`));
    if (mine !== asked) return;
    detail.replaceChildren(content);
    detail.dataset.point = point;
    detail.scrollTop = 0;
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

  async function compare(a, b) {
    stopComparing();
    const found = isFile ? compared(a, b)
      : parsed(await fragment(`/tree/diff?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`));
    const back = make("p");
    const button = make("button", "Back to the session");
    button.type = "button";
    button.addEventListener("click", safely(() => show(a)));
    back.append(button);
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

  function compared(a, b) {
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
    else if (target.matches("i[title]")) say(`${JSON.stringify(target.textContent)}: ${target.title}`);
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
      if (!answer.ok) { say(told.error); return; }
      await refresh(true);
      if (told.at) await show(told.at);
      else detail.replaceChildren();
      say(told.said);
    } catch (error) {
      if (error.message !== "401") say("The gateway did not answer.");
    } finally {
      button.disabled = false;
    }
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
        say(`The texts of ${FOLLOWED} requests grow at once; fold one first.`);
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
    summary.textContent = `${branch ? `${branch} is ` : ""}over; its session is in the tree`;
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
    if (now === version && !always) return;
    const shut = [...sessions.querySelectorAll("[aria-expanded=false]")].map((item) => item.dataset.point).join(",");
    const body = new URLSearchParams({ open: unfolded(), shut, at: detail.dataset.point ?? "" });
    const content = parsed(await whole("/tree/sessions", { method: "POST", body }));
    const focused = document.activeElement && itemOf(document.activeElement)?.id;
    const scroll = sessions.scrollTop;
    sessions.replaceChildren(content.getElementById("tree"));
    document.getElementById("totals").replaceWith(content.getElementById("totals"));
    showRunning(content.getElementById("running"));
    sessions.scrollTop = scroll;
    version = now;
    const item = focused && document.getElementById(focused);
    if (item) focusItem(item); else enter();
  }

  async function poll() {
    if (document.visibilityState === "visible") {
      try {
        await refresh(false);
      } catch (error) {
        if (error.message === "401") return;
        say("The gateway does not answer; trying again.");
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
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && comparing) stopComparing(); });
  enter();
  if (!isFile) {
    document.getElementById("running").addEventListener("toggle", onToggle, true);
    setTimeout(poll, POLL_MS);
  }
})();
