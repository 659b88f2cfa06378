(() => {
  const form = document.querySelector("form.filter");
  if (!form) return;
  const rows = [...document.querySelectorAll("#all-frontends tbody tr")].map((row) => [row, row.textContent.toLowerCase()]);
  const output = form.querySelector("output");
  const filter = () => {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const state = form.elements.state.value;
    let shown = 0;
    for (const [row, text] of rows) {
      const fits = (!state || row.dataset.state === state) && words.every((word) => text.includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    output.textContent = `${shown} of ${rows.length}`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
})();
