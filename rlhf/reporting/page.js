// Columns sort by a click or a key on their heading; gaps come last either way.
const parts = (text) => text.split(/(\d+(?:\.\d+)?(?:e[-+]?\d+)?)/i); // words and numbers in turn

// Numbers by value, also within words: kl_coef=0.02 before kl_coef=0.1.
function compare(a, b) {
  if (!isNaN(a) && !isNaN(b)) return a - b;
  const [ours, theirs] = [parts(a), parts(b)];
  for (let i = 0; i < Math.min(ours.length, theirs.length); i++) {
    const order = i % 2 ? ours[i] - theirs[i] : ours[i].localeCompare(theirs[i], "en");
    if (order) return order;
  }
  return ours.length - theirs.length;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.v;
      const rows = [...body.rows].sort((one, two) => {
        const [a, b] = [key(one), key(two)];
        return a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b);
      });
      body.append(...rows);
    });
  });
}
