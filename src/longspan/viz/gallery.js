"use strict";
const box = document.querySelector("nav input");
const chips = [...document.querySelectorAll("nav button")];
const cards = [...document.querySelectorAll("#cards section")];
const count = document.querySelector("nav output");
let family = "";

function filter() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const match = words.every((word) => card.dataset.words.includes(word));
    card.hidden = !match || (family !== "" && card.dataset.family !== family);
    shown += !card.hidden;
  }
  count.value = `${shown} of ${cards.length}`;
}

box.addEventListener("input", filter);
for (const chip of chips) {
  chip.setAttribute("aria-pressed", "false");
  chip.addEventListener("click", () => {
    family = family === chip.dataset.family ? "" : chip.dataset.family;
    for (const other of chips) {
      other.setAttribute("aria-pressed", String(other.dataset.family === family));
    }
    filter();
  });
}

const body = document.querySelector(".compare tbody");
document.querySelectorAll(".compare thead button").forEach((button, column) => {
  let rising = false;
  button.addEventListener("click", () => {
    rising = !rising;
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) =>
      column === 0 ? a.cells[0].textContent.localeCompare(b.cells[0].textContent) : value(a) - value(b)
    );
    body.append(...(rising ? rows : rows.reverse()));
  });
});
