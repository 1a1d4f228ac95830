
"use strict";
// Makes the heads of sortable tables buttons; without this script the tables stay as they were written.
document.documentElement.classList.add("scripted");
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
      const numeric = body.rows.length > 0 && body.rows[0].cells[column].dataset.key !== undefined;
      const compare = (first, second) => {
        const one = key(first), other = key(second);
        if (one === "" || other === "") return (one === "") - (other === "");  // no value: last, either way
        const order = numeric ? Number(one) - Number(other) : one.localeCompare(other, undefined, { numeric: true });
        return descending ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
