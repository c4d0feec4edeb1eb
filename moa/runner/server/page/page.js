"use strict";
setInterval(async () => {
  const state = document.getElementById("state");
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.getElementById("live").replaceWith(page.getElementById("live"));
  } catch {
    state.textContent = "not reachable; the numbers are old";
    state.className = "bad";
  }
}, 2000);
