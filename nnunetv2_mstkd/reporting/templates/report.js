
"use strict";
// Sorts tables, goes through slices and enlarges pictures; without this script the page stays as it was written.
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

// The slider of a case chooses the slice of all its pictures.
for (const slices of document.querySelectorAll(".slices")) {
  const slider = slices.querySelector("input");
  slider?.addEventListener("input", () => {
    slices.dataset.slice = slider.value;
    slices.querySelector("output").value = slices.dataset.slices.split(" ")[slider.value];
  });
}

// A click on a picture shows it as large as the window allows, another one closes it.
const dialog = document.body.appendChild(document.createElement("dialog"));
dialog.addEventListener("click", () => dialog.close());
for (const picture of document.querySelectorAll(".picture, #lead img, #figures img, .enlarge img")) {
  picture.classList.add("enlarges");
  picture.tabIndex = 0;
  picture.setAttribute("role", "button");
  const enlarge = () => {
    const copy = picture.cloneNode(true);
    copy.removeAttribute("tabindex");
    if (copy.matches(".picture")) {
      const ratio = picture.clientWidth / picture.clientHeight;
      copy.style.width = `min(98vw, ${96 * ratio}vh)`;
    }
    dialog.dataset.slice = picture.closest(".slices")?.dataset.slice ?? "";
    dialog.replaceChildren(copy);
    dialog.showModal();
  };
  picture.addEventListener("click", enlarge);
  picture.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(); });
}

// A link to the pictures of a case unfolds them.
for (const link of document.querySelectorAll('a[href^="#montage-"]')) {
  link.addEventListener("click", () => { document.querySelector(link.hash).parentElement.open = true; });
}
