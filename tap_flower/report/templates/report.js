"use strict";
// Tips: of the mark under the pointer, or of the one that the arrow keys have come to.
const tip = document.getElementById("tip");
let on = null;

function words(mark) {
  const title = mark.querySelector("title");
  if (title) { // else the browser would show its own tip as well
    const of = mark.closest("[data-of]");
    mark.dataset.tip = (of ? of.dataset.of : "") + title.textContent;
    title.remove();
  }
  return mark.dataset.tip;
}

function show(mark) {
  hide();
  on = mark;
  mark.classList.add("on");
  tip.textContent = words(mark);
  tip.hidden = false;
  const at = mark.getBoundingClientRect();
  const left = at.left + at.width / 2 - tip.offsetWidth / 2;
  const above = at.top - tip.offsetHeight - 8;
  tip.style.left = Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = (above < 4 ? at.bottom + 8 : above) + "px";
}

function hide() {
  if (on) on.classList.remove("on");
  on = null;
  tip.hidden = true;
}

document.addEventListener("pointerover", event => {
  const mark = event.target.closest(".m");
  if (mark) show(mark); else if (on) hide();
});
document.addEventListener("focusout", hide);
document.addEventListener("scroll", hide, {passive: true});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") return hide();
  const chart = event.target.closest("svg.chart");
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (!chart || !(step || event.key === "Home" || event.key === "End")) return;
  const marks = [...chart.querySelectorAll(".m")].filter(mark => !mark.closest("g.off"));
  if (!marks.length) return;
  event.preventDefault();
  const place = on ? marks.indexOf(on) : -1;
  const next = event.key === "Home" ? 0 : event.key === "End" ? marks.length - 1
    : place < 0 ? 0 : (place + step + marks.length) % marks.length;
  const box = chart.closest(".scroll");
  if (box) {
    const at = marks[next].getBoundingClientRect(), frame = box.getBoundingClientRect();
    if (at.left < frame.left || at.right > frame.right) box.scrollLeft += at.left - frame.left - frame.width / 2;
  }
  requestAnimationFrame(() => requestAnimationFrame(() => show(marks[next])));
});

// A name in a legend switches its series off and on.
document.addEventListener("click", event => {
  const button = event.target.closest("button[data-toggle]");
  if (!button) return;
  const pressed = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", pressed);
  for (const series of button.closest("figure").querySelectorAll(".series"))
    if (series.dataset.series === button.dataset.toggle) series.classList.toggle("off", !pressed);
});
