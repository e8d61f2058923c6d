"use strict";
// Sorting and searching of the table of modules. Without scripts the table is there all the same, worst first.
(function () {
  const table = document.getElementById("modules-table");
  if (!table) return;
  const body = table.tBodies[0];
  const collator = new Intl.Collator("en", { numeric: true });
  const status = document.getElementById("modules-status");
  const key = (row, column) => row.cells[column].dataset.v ?? "";

  function sort(head) {
    const column = head.cellIndex;
    const was = head.getAttribute("aria-sort");
    const named = head.dataset.kind === "name";
    const first = named || head.dataset.kind === "low" ? "ascending" : "descending";
    const order = was === null ? first : was === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = Array.from(body.rows, (row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      // What has no figure comes last in either order.
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (named ? collator.compare(a, b) : a - b);
    });
    body.append(...rows.map(([, row]) => row));
    status.textContent = "Sorted by " + head.textContent.trim() + ", " + order + ".";
  }

  for (const button of table.tHead.querySelectorAll("button")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }

  const search = document.getElementById("modules-search");
  search.closest("form").hidden = false;
  search.closest("form").addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !row.cells[0].dataset.v.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    status.textContent = shown + " of " + body.rows.length + " modules shown.";
  });

  // A link to a row that the search hides shows it again.
  window.addEventListener("hashchange", () => {
    const row = document.getElementById(location.hash.slice(1));
    if (row && row.hidden) {
      search.value = "";
      search.dispatchEvent(new Event("input"));
      row.scrollIntoView({ block: "center" });
    }
  });
})();
