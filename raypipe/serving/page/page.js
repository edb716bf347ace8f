"use strict";
// Systems whose lists stand beside the recommender's: what heads them, and what is asked.
const BESIDE = {
  trsr: { heading: "In the order of", route: "rerank", wanted: (list) => ({ items: list.items.map((item) => item.item_id) }) },
  lancer: { heading: "Written by", route: "next", wanted: (list) => ({ count: list.items.length }), missing: "not there" },
};
const $ = (id) => document.getElementById(id);
const COUNT = 10;
let who = null; // what requests say of who asks
let asking = new AbortController(); // ends what is still told of somebody else

function made(tag, text = "", classes = "") {
  const element = document.createElement(tag);
  element.textContent = text; // never as HTML: titles and answers are anybody's text
  if (classes) element.className = classes;
  return element;
}

async function call(route, body) {
  const options = { headers: { Authorization: `Bearer ${$("token").value.trim()}` }, signal: asking.signal };
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(`v1/${route}`, options);
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `The service answers ${answer.status}.`);
  }
  return answer;
}

const ask = async (route, body) => (await call(route, body)).json();

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const [name, data] = event.split("\n");
      yield [name.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

async function begin() {
  const [standing, users] = await Promise.all([ask("release"), ask("users")]);
  $("standing").textContent =
    `Release ${standing.release.slice(0, 12)} · ${standing.recommender.slice(0, 20)} · ` +
    `${standing.items.toLocaleString()} items · night ${standing.night ?? "none"}`;
  $("users").replaceChildren(...users.users.map((user) => Object.assign(made("option"), { value: user })));
  const chosen = new Set([...document.querySelectorAll("#systems input:not(:checked)")].map((box) => box.value));
  const labels = Object.entries(standing.adapters)
    .filter(([, system]) => system === "recexplainer")
    .map(([name]) => {
      const label = made("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name });
      box.checked = !chosen.has(name);
      label.append(box, name);
      return label;
    });
  $("systems").replaceChildren($("systems").firstElementChild, ...labels);
  $("systems").hidden = !labels.length;
  $("read").closest("section").hidden = !Object.values(standing.adapters).includes("recinterpreter");
  return { ...standing, explains: labels.length > 0 };
}

async function show(event) {
  event?.preventDefault();
  asking.abort();
  asking = new AbortController();
  const mine = asking.signal;
  $("problem").textContent = "";
  sessionStorage.setItem("token", $("token").value);
  try {
    const standing = await begin();
    const user = $("user").value.trim();
    const items = $("history").value.split(/\s+/).filter(Boolean);
    if (!user && !items.length) return;
    who = user ? { user_id: user } : { history: items };
    const [told, list] = await Promise.all([
      user ? ask(`users/${encodeURIComponent(user)}`).catch(unknown) : null,
      ask("recommend", { ...who, count: COUNT }),
    ]);
    $("found").hidden = false;
    if (told) {
      showEvents(told.history.map((item) => item.title || item.item_id), told.events);
      showSummaries(told.summaries, told.problem);
    } else {
      showEvents(items, items.length);
      showSummaries({});
    }
    showList(list, standing.explains);
    showOthers(user, told, list);
    const beside = Object.entries(standing.adapters).filter(([, system]) => BESIDE[system] && list.basis === "model" && standing.lm);
    for (const [adapter, system] of beside) showBeside(adapter, BESIDE[system], list);
    for (const id of ["why", "readings"]) $(id).replaceChildren();
    $("why").append(made("p", "Ask why beside a recommendation.", "quiet"));
    if (!user && standing.lm) await summarise();
  } catch (problem) {
    if (!mine.aborted) $("problem").textContent = problem.message;
  }
}

const unknown = (problem) => ({ history: [], summaries: {}, recommended: [], events: 0, problem: problem.message });

function showEvents(titles, events) {
  $("history-title").textContent = `History: ${events} events`;
  $("events").start = events - titles.length + 1;
  $("events").replaceChildren(...titles.map((title) => made("li", title)));
  $("events").scrollTop = $("events").scrollHeight;
}

function showSummaries(texts, otherwise = "None is written.") {
  const shown = Object.entries(texts).map(([name, text]) => {
    const paragraph = made("p");
    paragraph.append(made("span", `${name}: `, "quiet"), text);
    return paragraph;
  });
  $("summaries").replaceChildren(...(shown.length ? shown : [made("p", otherwise, "quiet")]));
}

async function summarise() {
  $("summaries").replaceChildren(made("p", "", "growing"));
  try {
    showSummaries((await ask("summary", who)).summaries);
  } catch (problem) {
    showSummaries({}, problem.message);
  }
}

function showList(list, explains) {
  $("basis").textContent = list.basis === "model" ? `By release ${list.served.release.slice(0, 12)}` : "What is popular: nothing is known";
  const rows = list.items.map((item, place) => {
    const row = made("tr");
    const button = Object.assign(made("button", "why?"), { type: "button" });
    button.append(made("span", ` ${item.title}`, "unseen"));
    button.disabled = !explains || list.basis !== "model";
    button.addEventListener("click", () => why(item));
    const last = made("td");
    last.append(button);
    row.append(made("td", place + 1), made("td", item.title || item.item_id), made("td", item.score?.toFixed(3) ?? "", "number"), last);
    return row;
  });
  $("list").replaceChildren(...rows);
}

async function why(item) {
  const systems = [...document.querySelectorAll("#systems input:checked")].map((box) => box.value);
  $("why-title").textContent = `Why ${item.title || item.item_id}?`;
  $("why").replaceChildren(...(systems.length ? [] : [made("p", "Choose who explains.", "quiet")]));
  $("why-title").focus({ preventScroll: true });
  $("why-title").scrollIntoView({ block: "nearest" });
  await Promise.all(systems.map((system) => explain(item, system)));
}

async function explain(item, system) {
  const panel = made("article");
  const decision = made("strong");
  const text = made("p", "", "growing");
  const state = made("p", "is being written", "unseen");
  state.setAttribute("role", "status"); // told once it is whole: a screen reader would stumble over its pieces
  const head = made("h3", `${system}: `);
  head.append(decision);
  panel.append(head, text, state);
  $("why").append(panel);
  try {
    const answer = await call("explain/stream", { ...who, item_id: item.item_id, adapter: system });
    let ended = false;
    for await (const [name, data] of eventsOf(answer)) {
      if (name === "decision") Object.assign(decision, { textContent: data.decision, className: data.decision });
      else if (name === "text") text.append(data.text);
      else if (name === "again") text.textContent = "";
      else if (name === "done") text.textContent = state.textContent = data.text;
      else if (name === "error") throw new Error(data.message);
      ended = name === "done";
    }
    if (!ended) throw new Error("The connection ended before the explanation did.");
  } catch (problem) {
    text.textContent = problem.message;
    text.classList.add("failed");
  }
  text.classList.remove("growing");
}

async function read() {
  $("readings").replaceChildren();
  const shown = (told) => (told.titles ? told.titles.join(" → ") : told.title ?? told.text) || "nothing";
  const asked = [
    ["interpret", "Titles in it", "in fact"],
    ["residual", "The last step", "in fact"],
    ["oracle", "What it expects next", "the item nearest to that"],
  ];
  $("read").disabled = true;
  for (const [route, name, truth] of asked) {
    const value = made("dd", "", "growing");
    $("readings").append(made("dt", name), value);
    try {
      const told = await ask(route, who);
      value.textContent = shown(told);
      value.append(made("div", `${truth}: ${told.expected ?? told.history.join(" → ")}`, "quiet"));
    } catch (problem) {
      value.textContent = problem.message;
      value.classList.add("quiet");
    }
    value.classList.remove("growing");
  }
  $("read").disabled = false;
}

function showOthers(user, told, list) {
  const columns = told?.recommended?.length ? [["The night's own list", told.recommended]] : [];
  // What this page has seen of other releases stays until the tab is closed.
  const key = `lists ${JSON.stringify(who)}`;
  const seen = JSON.parse(sessionStorage.getItem(key) ?? "{}");
  for (const [release, items] of Object.entries(seen)) {
    if (release !== list.served.release) columns.push([`Release ${release.slice(0, 12)}`, items]);
  }
  seen[list.served.release] = list.items;
  sessionStorage.setItem(key, JSON.stringify(seen));
  const shown = columns.map(([name, items]) => {
    const column = made("div");
    column.append(made("h3", name), compared(items, list, "now", "not any more"));
    return column;
  });
  $("releases").replaceChildren(...(shown.length ? shown : [made("p", "None yet: lists of another release are kept here when one is served.", "quiet")]));
}

function compared(items, list, when, missing) {
  const places = new Map(list.items.map((item, place) => [item.item_id, place + 1]));
  const entries = made("ol");
  for (const item of items) {
    const place = places.get(item.item_id);
    const entry = made("li", `${item.title || item.item_id} `);
    entry.append(made("span", place ? `${when} ${place}.` : missing, "quiet"));
    entries.append(entry);
  }
  return entries;
}

async function showBeside(adapter, { heading, route, wanted, missing }, list) {
  const column = made("div");
  const waiting = made("p", "", "growing");
  column.append(made("h3", `${heading} ${adapter}`), waiting);
  $("releases").querySelector(":scope > p")?.remove();
  $("releases").prepend(column);
  try {
    const told = await ask(route, { ...who, ...wanted(list), adapter });
    waiting.replaceWith(compared(told.items, list, "there", missing));
  } catch (problem) {
    waiting.textContent = problem.message;
    waiting.className = "quiet";
  }
}

$("token").value = sessionStorage.getItem("token") ?? "";
$("ask").addEventListener("submit", show);
$("user").addEventListener("input", () => ($("history").value = ""));
$("history").addEventListener("input", () => ($("user").value = ""));
$("read").addEventListener("click", read);
if ($("token").value) show();
