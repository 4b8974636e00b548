document.querySelectorAll("table.sortable").forEach(table => {
  table.querySelectorAll("th").forEach((head, column) => {
    head.dataset.sort = ""; head.tabIndex = 0;
    const sort = () => {
      const down = !head.classList.contains("down");
      table.querySelectorAll("th").forEach(h => h.classList.remove("up", "down"));
      head.classList.add(down ? "down" : "up");
      const value = row => { const c = row.cells[column]; const v = c.dataset.value; return v === undefined ? c.textContent : v === "" ? null : +v; };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => { const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return (typeof x === "string" ? x.localeCompare(y) : x - y) * (down ? -1 : 1); });
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", e => { if (e.key === "Enter") sort(); });
  });
});
